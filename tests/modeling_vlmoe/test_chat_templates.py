"""The wrapped template renders the parent's text byte for byte, writes image tokens, and marks the answers."""

import importlib.util
import logging
import re
from pathlib import Path

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from modeling_vlmoe.chat_templates import END, START, build_chat_template, default_chat_template
from tests import tiny

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}
PHI3 = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>\n' + message['content'] + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
LLAMA2 = (
    "{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] %}"
    "{% set messages = messages[1:] %}{% endif %}"
    "{% for message in messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('must alternate') }}{% endif %}"
    "{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' }}"
    "{% if loop.first and system is defined %}{{ '<<SYS>>' + system + '<</SYS>>' }}{% endif %}"
    "{{ message['content'].strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + message.content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
WHITESPACE = "\n  {% for message in messages %}\n    {{ message.role }}: {{ message.content }}\n{% endfor %}\n\n  \n"
NO_SYSTEM = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}" + tiny.CHATML
HAND_WRITTEN = {
    "chatml": tiny.CHATML,
    "phi3": PHI3,
    "llama2": LLAMA2,
    "whitespace": WHITESPACE,
    "no-system": NO_SYSTEM,
    "default": default_chat_template("</s>", "<s>"),
}


def shipped_templates() -> dict[str, str]:
    """The chat templates of real models that TRL ships, and its training variants of them."""
    spec = importlib.util.find_spec("trl")
    if spec is None or spec.origin is None:
        return {}
    folder = Path(spec.origin).parent / "chat_templates"
    return {path.stem: path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.jinja"))}


SHIPPED = shipped_templates()
PARTS_ONLY_NAMES = {"idefics3", "smolvlm", "llava_next"}
UNMARKED = {name for name, text in SHIPPED.items() if not re.search(r"\{%-?\s*generation", text)} - PARTS_ONLY_NAMES
# TRL marks GLM's next header, gpt-oss' changing end of turn, DiffusionGemma's answers in two pieces, and Phi-3's end
# of text behind the end of turn.
MARKED_UNLIKE_OURS = {"glm4moe", "gptoss", "diffusion_gemma", "phi3", "phi3_5"}
WITH_TRAINING_VARIANT = sorted({n for n in UNMARKED if f"{n}_training" in SHIPPED} - MARKED_UNLIKE_OURS)
TEMPLATES = HAND_WRITTEN | {name: SHIPPED[name] for name in sorted(UNMARKED)}


def user(content):
    return {"role": "user", "content": content}


def assistant(content, **keys):
    return {"role": "assistant", "content": content, **keys}


SYSTEM = {"role": "system", "content": "Be kind.\n"}
WEATHER = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Kyoto"}}}
CONVERSATIONS = {
    "one-turn": [user("Who?"), assistant("Me.")],
    "question-only": [user("Who?")],
    "system": [SYSTEM, user("Who?"), assistant("Me."), user("Why?")],
    "three-turns": [user("a b"), assistant("c\nd"), user("e"), assistant("f"), user("g"), assistant("h")],
    "spaces": [user("\n who? \t"), assistant("\n\n  me \n\n"), user("  why?\n"), assistant("   so ")],
    "reasoning": [
        user("Who?"),
        assistant("<think>\nhm, hm\n</think>\n\n  Me.\n"),
        user("Why?"),
        assistant("<think>x</think>y"),
    ],
    "reasoning-key": [user("Who?"), assistant("Me.", reasoning_content="let me see")],
    "unfinished-reasoning": [user("Who?"), assistant("<think>\nhm")],
    "reasoning-only": [user("Who?"), assistant("<think>\nhm\n</think>\n\n")],
    "empty-answer": [user("Who?"), assistant("")],
    "tool-response-in-user": [user("a"), assistant("b"), user("<tool_response>1</tool_response>"), assistant("c")],
    "tool-call": [
        user("Sun?"),
        assistant("", tool_calls=[WEATHER]),
        {"role": "tool", "content": "yes"},
        assistant("Yes."),
    ],
    "said-tool-call": [user("Sun?"), assistant("I look.", tool_calls=[WEATHER])],
    "no-assistant-content": [user("Sun?"), {"role": "assistant", "tool_calls": [WEATHER]}],
    "quotes": [user("'\"{{ x }}\\n"), assistant("\\ {% y %} \U0001f642 ' \" </s")],
}


def render(template, messages, **variables):
    return render_jinja_template([messages], chat_template=template, **{**SPECIAL, **variables})[0][0]


def render_or_refuse(template, messages, **variables):
    try:
        return render(template, messages, **variables)
    except Exception as error:  # whatever the parent raises, the wrapped template has to raise
        return type(error).__name__


def spans(template, messages, **variables):
    texts, indices = render_jinja_template(
        [messages], chat_template=template, return_assistant_tokens_mask=True, **{**SPECIAL, **variables}
    )
    return [texts[0][start:end] for start, end in indices[0]]


@pytest.fixture(scope="module")
def wrapped():
    cache = {}

    def build(name):
        return cache.setdefault(
            name, build_chat_template(TEMPLATES[name], "<image>", SPECIAL, ["<|end|>", "<|user|>"])
        )

    return build


@pytest.mark.parametrize("name", TEMPLATES)
def test_wrapped_template_renders_the_parents_text(name, wrapped):
    template, compared = wrapped(name), 0
    for messages in CONVERSATIONS.values():
        for variables in ({}, {"add_generation_prompt": True}, {"enable_thinking": False}):
            expected = render_or_refuse(TEMPLATES[name], messages, **variables)
            assert render_or_refuse(template, messages, **variables) == expected
            compared += not expected.endswith("Error")
    assert compared > len(CONVERSATIONS)


@pytest.mark.parametrize("name", TEMPLATES)
def test_marks_hold_the_answers_and_nothing_of_the_users(name, wrapped):
    marked = spans(wrapped(name), CONVERSATIONS["three-turns"])
    assert len(marked) == 3
    for text, answer in zip(marked, ("c\nd", "f", "h"), strict=True):
        assert text.rstrip().count(answer) >= 1
        assert "[INST]" not in text
        assert "a b" not in text


@pytest.mark.parametrize("name", WITH_TRAINING_VARIANT)
def test_marks_agree_with_the_training_templates_of_trl(name, wrapped):
    """Theirs are hand-made; they mark the newline behind an answer too, and some the header: the rest is compared."""
    messages = [user("q one"), assistant("answer one"), user("q two"), assistant("answer two")]
    theirs = [text.rstrip() for text in spans(SHIPPED[f"{name}_training"], messages)]
    ours = spans(wrapped(name), messages)
    assert [text[text.index("answer") :] for text in ours] == [text[text.index("answer") :] for text in theirs]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("chatml", ["\n\n  me \n\n<|im_end|>", "   so <|im_end|>"]),
        ("phi3", ["\n\n  me \n\n<|end|>", "   so <|end|>"]),
        ("llama2", [" me </s>", " so </s>"]),
        ("default", [" \n\n  me \n\n</s>", "    so </s>"]),
        ("no-system", ["\n\n  me \n\n<|im_end|>", "   so <|im_end|>"]),
    ],
)
def test_marks_reach_from_the_generation_prompt_to_the_end_of_turn(name, expected, wrapped):
    assert spans(wrapped(name), CONVERSATIONS["spaces"]) == expected


def test_marks_hold_reasoning_and_tool_calls_that_the_model_writes(wrapped):
    earlier, last = spans(wrapped("qwen3"), CONVERSATIONS["reasoning"])
    assert earlier == "  Me.\n<|im_end|>"
    assert last == "<think>\nx\n</think>\n\ny<|im_end|>"
    assert "let me see" in spans(wrapped("qwen3"), CONVERSATIONS["reasoning-key"])[0]
    (call,) = spans(wrapped("qwen3"), CONVERSATIONS["said-tool-call"])
    assert "</tool_call><|im_end|>" in call


def test_an_unmarked_turn_does_not_widen_the_next_mark(wrapped):
    assert spans(wrapped("chatml"), CONVERSATIONS["tool-call"]) == ["Yes.<|im_end|>"]
    header_once = (
        "{% for message in messages %}{% if loop.changed(message.role) %}{{ '<' + message.role + '>' }}{% endif %}"
        "{{ message.content }}</turn>\n{% endfor %}{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
    )
    template = build_chat_template(header_once, "<image>", SPECIAL, ["</turn>"])
    messages = [user("a"), assistant(""), assistant("b"), user("c"), assistant(" d")]
    assert render(template, messages) == render(header_once, messages)
    assert spans(template, messages) == ["b</turn>", " d</turn>"]


@pytest.mark.parametrize("name", TEMPLATES)
def test_image_parts_become_tokens_in_their_order(name, wrapped):
    template = wrapped(name)
    image, text = {"type": "image", "text": None}, {"type": "text", "text": "What is it?", "image": None}
    for parts, expected in (
        ([image, text], "<image>\nWhat is it?"),
        ([image, image, text], "<image>\n<image>\nWhat is it?"),
        ([text, image], "What is it?\n<image>"),
        ([text, image, text], "What is it?\n<image>\nWhat is it?"),
        ([{"type": "text", "text": "Is "}, image, {"type": "text", "text": " it?"}], "Is <image> it?"),
        ([image, {"type": "text", "text": ""}], "<image>"),
        ([text, text], "What is it?What is it?"),
    ):
        found = render(template, [user(parts), assistant([{"type": "text", "text": "Yes."}])])
        assert found == render(TEMPLATES[name], [user(expected), assistant("Yes.")])


def test_string_content_with_an_image_token_passes_through(wrapped):
    assert "<image>\nWhat?" in render(wrapped("chatml"), [user("<image>\nWhat?")])


def test_private_characters_in_messages_are_dropped(wrapped):
    messages = [user(f"a{START}b{END}"), assistant(f"{END}c{START}")]
    assert render(wrapped("chatml"), messages) == render(tiny.CHATML, [user("ab"), assistant("c")])
    assert spans(wrapped("chatml"), messages) == ["c<|im_end|>"]


def test_raises_when_a_part_is_a_video(wrapped):
    with pytest.raises(Exception, match="type video are not supported"):
        render(wrapped("chatml"), [user([{"type": "video"}])])


NATIVE = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' }}{% if message.content is string %}"
    "{{ message.content }}{% else %}{% for part in message.content %}{% if part.type == 'image' %}<v><image></v>"
    "{% else %}{{ part.text }}{% endif %}{% endfor %}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
PARTS_ONLY = (
    "{% for message in messages %}{{ message.role | upper + ': ' }}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ '<image>\n' }}{% else %}{{ part['text'] }}{% endif %}{% endfor %}"
    "{{ eos_token }}{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
IMAGE_CHAT = [user([{"type": "image"}, {"type": "text", "text": "What?"}]), assistant("A cat.")]


def test_templates_that_render_images_themselves_keep_doing_so():
    template = build_chat_template(NATIVE, "<image>", SPECIAL)
    assert "<v><image></v>What?" in render(template, IMAGE_CHAT)
    assert spans(template, IMAGE_CHAT) == ["A cat.<|im_end|>"]


def test_templates_that_take_only_parts_are_given_parts():
    template = build_chat_template(PARTS_ONLY, "<image>", SPECIAL)
    assert render(template, IMAGE_CHAT) == "USER: <image>\nWhat?</s>ASSISTANT: A cat.</s>"
    assert spans(template, IMAGE_CHAT) == [" A cat.</s>"]
    assert render(template, [user("Hi")], add_generation_prompt=True) == "USER: Hi</s>ASSISTANT:"


def test_templates_with_images_and_marks_are_kept_as_they_are(wrapped):
    assert build_chat_template(wrapped("chatml"), "<image>", SPECIAL) == wrapped("chatml")


def test_templates_with_marks_of_their_own_keep_them():
    own = tiny.CHATML.replace("{{ '<|im_start|>'", "{% generation %}{{ '<|im_start|>'").replace(
        "{% endfor %}", "{% endgeneration %}{% endfor %}"
    )
    template = build_chat_template(own, "<image>", SPECIAL)
    assert template.endswith(own)
    assert spans(template, [user("a")]) == spans(own, [user("a")]) == ["<|im_start|>user\na<|im_end|>\n"]
    assert "<image>\nWhat?" in render(template, IMAGE_CHAT)


def test_warns_when_answers_cannot_be_marked(caplog):
    repeated = tiny.CHATML.replace("message['content']", "message['content'] + message['content']")
    template = build_chat_template(repeated, "<image>", SPECIAL)
    assert "generation" not in template.replace("add_generation_prompt", "")
    assert "no generation marks" in caplog.text
    assert "<image>\nWhat?" in render(template, IMAGE_CHAT)


def test_warns_when_answers_are_not_closed(caplog):
    build_chat_template(WHITESPACE, "<image>", SPECIAL)
    assert "no end-of-turn string" in caplog.text


def test_is_silent_when_all_is_well(caplog):
    with caplog.at_level(logging.INFO):
        build_chat_template(tiny.CHATML, "<image>", SPECIAL)
    assert not caplog.records


@pytest.mark.parametrize("content", ["''", "message['content'] | reverse"])
def test_raises_when_the_template_drops_what_is_said(content):
    with pytest.raises(ValueError, match="neither string contents nor lists of text parts"):
        build_chat_template(tiny.CHATML.replace("message['content']", content), "<image>", SPECIAL)


def test_an_image_token_with_quotes_is_written_as_it_is():
    token = "<'im\\age\"é🙂>"
    template = build_chat_template(tiny.CHATML, token, SPECIAL)
    assert f"user\n{token}\nWhat?<|im_end|>" in render(template, IMAGE_CHAT)
