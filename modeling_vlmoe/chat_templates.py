r"""Gives a text model's chat template image parts and `{% generation %}` marks.

The one invariant: on text the new template renders the same bytes as the parent's. The parent's text is kept verbatim
inside a wrapper, and `build_chat_template` proves the invariant on probe conversations before it returns.

    prelude             messages -> messages whose content is one string: an image part becomes the image token, an
                        assistant's answer stands between two private characters, START and END
    parent's template   verbatim, rendered into a block
    epilogue            cuts the block at START and END, drops them, and puts what the model has to write (the answer
                        with its end-of-turn string) inside `{% generation %}`

Image parts keep their order. A newline separates an image from a neighbouring part unless one of them already has
white space there, LLaVA's convention: `[image, image, text("What?")]` gives `<image>\n<image>\nWhat?`. Text parts are
joined with nothing between, as the host's templates do.

What is marked of an assistant turn: from the end of the generation prompt (so also a reasoning block or white space
that precedes the answer) to the end of the end-of-turn string (so also tool calls that follow the answer). An
assistant turn without an answer, of tool calls or reasoning only, has no text to hold the private characters (an empty
content has to stay empty, templates ask for it) and stays unmarked.

Example:
    >>> template = build_chat_template(tokenizer.chat_template, "<image>", tokenizer.special_tokens_map)
"""

import logging
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from jinja2.exceptions import TemplateError
from transformers.utils.chat_template_utils import render_jinja_template

logger = logging.getLogger(__name__)

Messages = list[dict[str, Any]]
Render = Callable[..., str]

# Unicode noncharacters: never in interchanged text, so no message can hold them by right (the prelude drops them).
START, END = "\ufdd0", "\ufdd1"

# What a template may raise on a conversation that it does not support (a system turn, two user turns in a row).
TEMPLATE_ERRORS = (TemplateError, TypeError, ValueError, KeyError, IndexError, AttributeError)

# `trim_blocks` and `lstrip_blocks` are on in the host's environment: "{% set x %}\n" eats its own newline, and
# "{%+ endset %}" leaves the parent's last spaces alone.
PRELUDE = r"""{#- vlmoe: image parts become the image token. The parent's chat template follows, unchanged. -#}
{%- set vlmoe = namespace(messages=[], text='', parts=[], is_image=false, is_chat=true, answer='') -%}
{%- for message in messages -%}
{%- set vlmoe.text, vlmoe.parts, vlmoe.is_image, vlmoe.is_chat = '', [], false, true -%}
{%- if message['content'] is string -%}
{%- set vlmoe.text = message['content'] -%}
{%- set vlmoe.parts = [{'type': 'text', 'text': message['content']}] -%}
{%- elif message['content'] is defined and message['content'] is sequence and message['content'] is not mapping -%}
{%- for part in message['content'] -%}
{%- set piece = '' -%}
{%- if part is string -%}
{%- set piece = part -%}
{%- elif part is not mapping or part['type'] is not defined -%}
{%- set vlmoe.is_chat = false -%}
{%- elif part['type'] in ('image', 'image_url') -%}
{%- set piece = @IMAGE@ -%}
{%- elif part['type'] == 'text' -%}
{%- set piece = part['text'] or '' -%}
{%- else -%}
{{- raise_exception('Message parts of type ' ~ part['type'] ~ ' are not supported: use text and image parts.') -}}
{%- endif -%}
{%- if piece -%}
{%- set is_image = part is mapping and part['type'] != 'text' -%}
{%- set vlmoe.parts = vlmoe.parts + [{'type': 'image'} if is_image else {'type': 'text', 'text': piece}] -%}
{%- if (is_image or vlmoe.is_image) and vlmoe.text[-1:].strip() and piece[:1].strip() -%}
{%- set vlmoe.text = vlmoe.text ~ '\n' -%}
{%- endif -%}
{%- set vlmoe.text, vlmoe.is_image = vlmoe.text ~ piece, is_image -%}
{%- endif -%}
{%- endfor -%}
{%- else -%}
{%- set vlmoe.is_chat = false -%}
{%- endif -%}
@MARK@{%- if vlmoe.is_chat -%}
{%- set message = dict(message, content=@CONTENT@) -%}
{%- endif -%}
{%- set vlmoe.messages = vlmoe.messages + [message] -%}
{%- endfor -%}
{%- set messages = vlmoe.messages %}
"""

# START goes behind the last reasoning block, which templates cut off, and both go inside the surrounding white space,
# which templates trim.
MARK = r"""{%- set vlmoe.text = vlmoe.text | replace(@START@, '') | replace(@END@, '') -%}
{%- set vlmoe.answer = vlmoe.text.split('</think>')[-1] -%}
{%- if vlmoe.is_chat and message['role'] == 'assistant' and vlmoe.answer.strip() -%}
{%- set before = vlmoe.text[:vlmoe.text | length - vlmoe.answer | length] -%}
{%- set space = vlmoe.answer | length - vlmoe.answer.lstrip() | length -%}
{%- set after = vlmoe.answer[space:][vlmoe.answer.strip() | length:] -%}
{%- set vlmoe.text = before ~ vlmoe.answer[:space] ~ @START@ ~ vlmoe.answer.strip() ~ @END@ ~ after -%}
{%- endif -%}
"""

EPILOGUE = r"""{%- set vlmoe = namespace(rest=vlmoe_body.split(@START@)[0]) -%}
{%- for turn in vlmoe_body.split(@START@)[1:] -%}
{%- set answer, after = turn.split(@END@)[0], turn.split(@END@)[1:] | join -%}
{%- set header = vlmoe.rest.rfind(@HEADER@) -%}
{%- set lead = vlmoe.rest[header + @HEADER@ | length:] if header >= 0 else '' -%}
{%- if @TURN_END@ and @TURN_END@ in lead -%}
{%- set lead = '' -%}
{%- endif -%}
{%- set turn_end = after.find(@TURN_END@) -%}
{%- set closing = after[:turn_end + @TURN_END@ | length] if turn_end >= 0 else '' -%}
{{- vlmoe.rest[:vlmoe.rest | length - lead | length] -}}
{%- generation -%}
{{- lead ~ answer ~ closing -}}
{%- endgeneration -%}
{%- set vlmoe.rest = after[closing | length:] -%}
{%- endfor -%}
{{- vlmoe.rest | replace(@END@, '') -}}
"""


@dataclass(frozen=True)
class ParentForm:
    """What the parent's template takes and already does.

    Args:
        takes_strings: it renders messages whose content is a string (a few VLM templates take lists of parts only).
        renders_images: an image part gives exactly one image token.
        marks_generation: it has `{% generation %}` marks of its own, which are left alone.
    """

    takes_strings: bool
    renders_images: bool
    marks_generation: bool


def default_chat_template(turn_end: str, bos_token: str = "") -> str:
    """A plain chat format for a tokenizer that has no template: no new tokens, every answer closed by the EOS token.

    Args:
        turn_end: the string that closes an answer, the tokenizer's EOS token.
        bos_token: the string that opens the text; empty for a tokenizer that adds none by itself.
    """
    return (
        f"{{{{- {_literal(bos_token)} -}}}}"
        "{%- for message in messages -%}"
        "{%- if message['role'] == 'assistant' -%}"
        f"{{{{- 'Assistant: ' ~ message['content'] ~ {_literal(turn_end)} ~ '\\n' -}}}}"
        "{%- else -%}"
        "{{- message['role'] | capitalize ~ ': ' ~ message['content'] ~ '\\n' -}}"
        "{%- endif -%}"
        "{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{- 'Assistant:' -}}{%- endif -%}"
    )


def build_chat_template(
    template: str,
    image_token: str,
    special_tokens: Mapping[str, str] | None = None,
    known_tokens: Iterable[str] = (),
) -> str:
    """Adds image parts and generation marks to a chat template; on text it renders what `template` renders.

    A template that renders image parts with `image_token` and has generation marks is returned as it is; one that does
    one of the two keeps doing it in its own way. Where the marks cannot be placed exactly, the template comes back
    with image parts only and a warning says so. Where not even that renders the parent's text, a ValueError is raised.

    Args:
        template: the parent's Jinja chat template.
        image_token: the string that stands for one image.
        special_tokens: the tokenizer's `special_tokens_map`, the variables that templates read (`eos_token`, ...).
        known_tokens: further tokens that are never split, to tell where an end-of-turn string ends.
    """
    special_tokens = dict(special_tokens or {})
    known_tokens = {token for token in (*special_tokens.values(), *known_tokens) if isinstance(token, str) and token}
    form = _probe_form(template, image_token, special_tokens)
    if form == ParentForm(takes_strings=True, renders_images=True, marks_generation=True):
        return template
    parent = _renderer(template, special_tokens, as_parts=not form.takes_strings)
    plain = _prelude(form, image_token, marks_answers=False) + template
    if not form.marks_generation:
        header, turn_end = _answer_header(parent, known_tokens), _turn_end(parent, known_tokens)
        marked = _wrap(template, form, image_token, header, turn_end)
        problem = _find_text_gap(marked, parent, special_tokens) or _find_mark_gap(marked, turn_end, special_tokens)
        if problem is None:
            if not turn_end:
                logger.warning(
                    "The chat template writes no end-of-turn string behind an answer: assistant-only training on it "
                    "does not teach the model to stop. Pass a chat_template that closes answers with the EOS token."
                )
            return marked
        logger.warning(
            "The chat template got image parts but no generation marks, so assistant-only losses and "
            "`return_assistant_tokens_mask` do not work with it: %s Pass a chat_template with `{%% generation %%}` "
            "marks.",
            problem,
        )
    if problem := _find_text_gap(plain, parent, special_tokens):
        raise ValueError(
            f"Image parts cannot be added to this chat template: {problem} Pass a chat_template that takes "
            "messages whose content is a list of text and image parts."
        )
    return plain


# --------------------------------------------------------------------------------------------------------------------
# The text of the new template


def _literal(text: str) -> str:
    """`text` as a Jinja string literal, in ASCII up to U+FFFF; Jinja's escapes know no surrogate pairs."""
    return "'" + "".join(_escaped(character) for character in text) + "'"


def _escaped(character: str) -> str:
    if character in "'\\":
        return "\\" + character
    if (character.isascii() and character.isprintable()) or ord(character) > 0xFFFF:
        return character
    return f"\\u{ord(character):04x}"


def _fill(text: str, **values: str) -> str:
    return re.sub(r"@([A-Z_]+)@", lambda match: values[match[1]], text)


def _prelude(form: ParentForm, image_token: str, marks_answers: bool) -> str:
    content = "vlmoe.text" if form.takes_strings else "[{'type': 'text', 'text': vlmoe.text}]"
    if form.renders_images:  # its own way to write images is kept; only what the assistant says has to be one string
        is_one_string = "message['role'] == 'assistant'"
        if form.takes_strings:
            is_one_string += " or message['content'] is string"
        content = f"{content} if {is_one_string} else vlmoe.parts"
    mark = _fill(MARK, START=_literal(START), END=_literal(END)) if marks_answers else ""
    return _fill(PRELUDE, IMAGE=_literal(image_token), MARK=mark, CONTENT=content)


def _wrap(template: str, form: ParentForm, image_token: str, header: str, turn_end: str) -> str:
    values = {"START": START, "END": END, "HEADER": header, "TURN_END": turn_end}
    body = template.removesuffix("\n")  # Jinja drops one newline at the end of a template, but not inside a block
    return (
        _prelude(form, image_token, marks_answers=True).rstrip("\n")
        + "{% set vlmoe_body %}\n"
        + body
        + "{%+ endset %}"
        + _fill(EPILOGUE, **{name: _literal(value) for name, value in values.items()})
    )


# --------------------------------------------------------------------------------------------------------------------
# What the parent's template does


def _as_parts(messages: Messages) -> Messages:
    return [{**message, "content": [{"type": "text", "text": message["content"]}]} for message in messages]


def _render_with_spans(template: str, messages: Messages, **variables: Any) -> tuple[str, list[tuple[int, int]]]:
    host_render: Callable[..., Any] = render_jinja_template  # annotated as returning a str, gives two lists
    texts, spans = host_render([messages], chat_template=template, return_assistant_tokens_mask=True, **variables)
    return texts[0], spans[0]


def _renderer(template: str, special_tokens: Mapping[str, str], as_parts: bool = False) -> Render:
    host_render: Callable[..., Any] = render_jinja_template

    def render(messages: Messages, **variables: Any) -> str:
        messages = _as_parts(messages) if as_parts else messages
        return host_render([messages], chat_template=template, **{**special_tokens, **variables})[0][0]

    return render


def _try(render: Render, messages: Messages, **kwargs) -> str | None:
    """The rendered text, or None where the template refuses the conversation."""
    try:
        return render(messages, **kwargs)
    except TEMPLATE_ERRORS:
        return None


def _user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def _assistant(content: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content}


def _probe_form(template: str, image_token: str, special_tokens: Mapping[str, str]) -> ParentForm:
    messages = [_user("vlmoe-question"), _assistant("vlmoe-answer")]

    def is_rendered(as_parts: bool) -> bool:
        text = _try(_renderer(template, special_tokens, as_parts), messages) or ""
        is_repr = "'type'" in text  # a template for strings writes Python's repr of a list
        return "vlmoe-question" in text and "vlmoe-answer" in text and not is_repr

    takes_strings = is_rendered(as_parts=False)
    if not takes_strings and not is_rendered(as_parts=True):
        raise ValueError(
            "The chat template renders neither string contents nor lists of text parts for a user and an assistant "
            "turn. Pass a chat_template that does."
        )
    render = _renderer(template, special_tokens)
    image, text = {"type": "image"}, {"type": "text", "text": "vlmoe-question"}
    answer = {"role": "assistant", "content": [{"type": "text", "text": "vlmoe-answer"}]}
    renders_images = all(
        (rendered := _try(render, [_user([image] * count + [text]), answer])) is not None
        and rendered.count(image_token) == count
        and rendered.count("vlmoe-question") == rendered.count("vlmoe-answer") == 1
        for count in (0, 1, 2)
    )
    marks_generation = re.search(r"\{%[-+]?\s*generation\s*[-+]?%\}", template) is not None
    return ParentForm(takes_strings, renders_images, marks_generation)


def _is_boundary(text: str, cut: int, known_tokens: set[str]) -> bool:
    """Whether `text` may be cut at `cut` without halving a token that is written in characters."""
    before, after = text[:cut], text[cut:]
    is_between_tokens = any(before.endswith(token) or after.startswith(token) for token in known_tokens)
    return not before or not after or before[-1].isspace() or after[0].isspace() or is_between_tokens


def _common_prefix(first: str, second: str, known_tokens: set[str]) -> str:
    """What both texts begin with, cut back to a boundary where both go on: `<|end|>` and `<|user|>` share nothing."""
    pairs = enumerate(zip(first, second, strict=False))
    length = next((index for index, (a, b) in pairs if a != b), min(len(first), len(second)))
    if length < min(len(first), len(second)):
        length = next(cut for cut in range(length, -1, -1) if _is_boundary(first, cut, known_tokens))
    return first[:length]


def _after(text: str, marker: str) -> str:
    return text.rpartition(marker)[2]


def _answer_header(parent: Render, known_tokens: set[str]) -> str:
    """What stands before everything the model writes: the generation prompt, as far as a finished turn repeats it."""
    prompt = _try(parent, [_user("vlmoe-question")], add_generation_prompt=True)
    no_prompt = _try(parent, [_user("vlmoe-question")], add_generation_prompt=False)
    turn = _try(parent, [_user("vlmoe-question"), _assistant("vlmoe-answer")])
    if prompt is None or no_prompt is None or turn is None:
        return ""
    prompt, no_prompt = _after(prompt, "vlmoe-question"), _after(no_prompt, "vlmoe-question")
    repeated = _common_prefix(_after(turn.partition("vlmoe-answer")[0], "vlmoe-question"), prompt, known_tokens)
    user_end = _common_prefix(no_prompt, prompt, known_tokens)
    # A template without a generation prompt (Llama 2) has the end of the user turn as its header.
    return repeated.removeprefix(user_end) or repeated


def _turn_end(parent: Render, known_tokens: set[str]) -> str:
    """The string that closes an answer, the same before a further turn and at the end; empty if there is none."""
    messages = [_user("vlmoe-question"), _assistant("vlmoe-answer"), _user("vlmoe-further"), _assistant("vlmoe-last")]
    last, between = _try(parent, messages[:2]), _try(parent, messages)
    if last is None or between is None:
        return ""
    last = _after(last, "vlmoe-answer")
    between = _after(between.partition("vlmoe-further")[0], "vlmoe-answer")

    def first_token(text: str) -> str:
        return min((t for t in known_tokens if t in text), key=lambda t: (text.find(t), -len(t)), default="")

    common = _common_prefix(last, between, known_tokens)
    return first_token(common) or common.strip() or first_token(last)


# --------------------------------------------------------------------------------------------------------------------
# The proof


def _probes() -> Iterator[Messages]:
    """Conversations that a template may trim, split, refuse or number: one to three turns, with and without system."""
    answers = ("A red cat.", " two words \n", "\n\nfirst line\n\n  second line\n\n", "ünï 图 🙂", "{{ x }} <b>&</b>")
    questions = ("What is it?", "  spaced \n", "\n- one\n- two\n", "Où? 哪里?", 'It\'s "quoted" {% raw %}')
    turns = [message for q, a in zip(questions, answers, strict=True) for message in (_user(q), _assistant(a))]
    system = {"role": "system", "content": " You are\nterse. "}
    for start in (0, 2, 4, 6, 8):
        yield turns[start : start + 2]
        yield [system, *turns[start : start + 2]]
    yield turns[:1]
    yield [system, *turns[:1]]
    yield turns[:3]
    yield turns[:4]
    yield turns[:6]
    yield [system, *turns[:5]]
    yield [system, *turns[2:8]]
    for reasoning in ("<think>\nbecause\n</think>\n\n", "<think>because</think>", "<think>\n\n</think>\n\n"):
        yield [_user("Why?"), _assistant(f"{reasoning}So.")]
        yield [_user("Why?"), _assistant(f"{reasoning}So.\n"), _user("Sure?"), _assistant(f"{reasoning} Yes.")]


def _find_text_gap(template: str, parent: Render, special_tokens: Mapping[str, str]) -> str | None:
    """A sentence about the first conversation on which `template` does not render the parent's bytes, or None."""
    render = _renderer(template, special_tokens)
    for messages in _probes():
        for add_generation_prompt in (False, True):
            expected = _try(parent, messages, add_generation_prompt=add_generation_prompt)
            found = _try(render, messages, add_generation_prompt=add_generation_prompt)
            if found != expected:
                return f"on {messages} it gives {found!r} where the parent's gives {expected!r}."
    return None


def _find_mark_gap(template: str, turn_end: str, special_tokens: Mapping[str, str]) -> str | None:
    """A sentence about the first conversation whose marks are not the answers with their end of turn, or None."""
    for messages in _probes():
        try:
            text, spans = _render_with_spans(template, messages, **special_tokens)
        except TEMPLATE_ERRORS:
            continue  # the parent refuses it too, as _find_text_gap has seen
        answers = [m["content"].split("</think>")[-1].strip() for m in messages if m["role"] == "assistant"]
        questions = [m["content"].strip() for m in messages if m["role"] == "user"]
        if len(spans) != len(answers):
            return f"on {messages} it marks {len(spans)} answers of {len(answers)}."
        next_starts = [*(start for start, _ in spans), len(text)][1:]
        for (start, end), answer, next_start in zip(spans, answers, next_starts, strict=True):
            marked, unmarked = text[start:end], text[end:next_start]
            is_closed = marked.endswith(turn_end) if turn_end in marked + unmarked else marked.endswith(answer)
            is_wide = (turn_end and marked.count(turn_end) > 1) or any(question in marked for question in questions)
            if answer not in marked or not is_closed or is_wide:
                return f"on {messages} it marks {marked!r} for the answer {answer!r}."
    return None
