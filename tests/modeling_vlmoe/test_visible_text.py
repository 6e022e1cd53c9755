"""Which text images may see, told by token ids alone: also of text that is rendered with the answers in it."""

import pickle
from functools import cache

import pytest
import torch
from PIL import Image
from transformers import AutoProcessor

from modeling_vlmoe import VLMoEProcessor, mark_visible_text
from modeling_vlmoe.visible_marks import AnswerTokens, find_answer_tokens, mark_visible
from tests import hosts, models, tiny

TEMPLATES = {
    "chatml": tiny.CHATML,
    "our_default": None,
    "llama2": "{% for m in messages %}{% if m['role'] == 'assistant' %}{{ ' ' + m['content'] + ' </s>' }}{% else %}"
    "{{ '<s>[INST] ' + m['content'] + ' [/INST]' }}{% endif %}{% endfor %}",
    "vicuna": "{% for m in messages %}{% if m['role'] == 'assistant' %}{{ 'ASSISTANT: ' + m['content'] + '</s>' }}"
    "{% else %}{{ m['role'] | upper + ': ' + m['content'] + ' ' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}",
    "closed_by_no_token": "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}",
    "prompt_with_reasoning": tiny.CHATML.replace("assistant\n' }}", "assistant\n<think>\n\n</think>\n\n' }}"),
}
QUESTION, ANSWER, FURTHER, LAST = "what colour? Ünï\n1.", "red: (7) it's\n\nso", 'is it "sure"?', "yes</think> 图."
IMAGE = {"type": "image"}


def marking(template: str | None = tiny.CHATML) -> VLMoEProcessor:
    made = models.processor(chat_template=template)
    made.marks_visible_text = True
    return made


@cache
def shared(name: str) -> VLMoEProcessor:
    """One of each template, not to be changed."""
    return marking(TEMPLATES[name])


def chat(*turns, num_images=1):
    """Turns of user and assistant; the images stand in the first."""
    roles = ("user", "assistant")
    content = [{"type": "text", "text": turn} for turn in turns]
    messages = [{"role": roles[index % 2], "content": [part]} for index, part in enumerate(content)]
    messages[0]["content"] = [*[IMAGE] * num_images, *messages[0]["content"]]
    return messages


def processed(processor, *conversations, num_images=1, has_prompt=False, **options):
    texts = [processor.apply_chat_template(one, add_generation_prompt=has_prompt) for one in conversations]
    pictures = [[Image.new("RGB", (24, 24))] * num_images] * len(texts)
    options = {"padding": True, "return_tensors": "pt"} | options
    return processor(text=texts, images=pictures if num_images else None, **options)


def seen(processor, made, row=0):
    """The text that is marked, in one string."""
    return processor.tokenizer.decode(made["input_ids"][row][made["mm_token_type_ids"][row] == 3])


@pytest.mark.parametrize("name", TEMPLATES)
def test_questions_are_marked_and_answers_are_not(name):
    processor = shared(name)
    made = processed(processor, chat(QUESTION, ANSWER, FURTHER, LAST))
    text = seen(processor, made)
    assert QUESTION in text
    assert (FURTHER in text) == (name != "closed_by_no_token")
    for answer in (ANSWER, LAST):
        assert answer not in text
    others = processed(processor, chat(QUESTION, "No.", FURTHER, "blue (8)"))
    assert seen(processor, others) == text  # so nothing of an answer is in it
    is_image = made["input_ids"] == processor.image_token_id
    assert torch.equal(made["mm_token_type_ids"] == 1, is_image)


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_prompt_is_marked_as_the_answered_conversation_is_up_to_there(name):
    processor = shared(name)
    prompt = processed(processor, chat(QUESTION), has_prompt=True)
    whole = processed(processor, chat(QUESTION, ANSWER, FURTHER, LAST))
    marks = [made["mm_token_type_ids"][0] for made in (prompt, whole)]
    ends = [int(((one == 0) & (torch.arange(len(one)) > 12)).long().argmax()) for one in marks]
    assert ends[0] == ends[1]
    assert torch.equal(marks[0][: ends[0]], marks[1][: ends[1]])
    assert (marks[0][ends[0] :] == 0).all()  # the header


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", ["chatml", "our_default"])
def test_padding_changes_no_mark(name, side):
    processor = marking(TEMPLATES[name])
    for pad in (processor.tokenizer.pad_token, processor.tokenizer.eos_token):  # the second closes answers too
        processor.tokenizer.pad_token = pad
        conversations = [chat(QUESTION, ANSWER), chat("b"), chat(QUESTION, ANSWER, FURTHER, LAST)]
        made = processed(processor, *conversations, padding_side=side)
        for row, conversation in enumerate(conversations):
            real = made["attention_mask"][row].bool()
            alone = processed(processor, conversation)["mm_token_type_ids"][0]
            assert torch.equal(made["mm_token_type_ids"][row][real], alone)
            assert (made["mm_token_type_ids"][row][~real] == 0).all()


@pytest.mark.parametrize("name", TEMPLATES)
def test_no_replacement_in_an_answer_changes_what_earlier_images_see(name):
    """Not even by the tokens that open and close answers."""
    processor = shared(name)
    made = processed(processor, chat(QUESTION, ANSWER, FURTHER, LAST))
    ids, types = made["input_ids"][0].tolist(), made["mm_token_type_ids"][0]
    image, answer = types.tolist().index(1), find_answer_tokens(processor)
    start = image + next(place for place, type_ in enumerate(types[image:].tolist()) if type_ == 0)
    start += len(answer.header)  # where the first answer begins
    others = [*answer.header[:2], answer.closer or 50, processor.tokenizer.pad_token_id, 100]
    for place in range(start, len(ids)):
        for other in others:
            changed = [*ids[:place], other, *ids[place + 1 :]]
            (row,) = processor.create_mm_token_type_ids([changed])
            assert row[:start] == types[:start].tolist()
            assert row[start] == 0 or place > start  # nothing behind the header is seen by the first image
            assert 3 not in row[start - len(answer.header) : start]


def test_headers_and_system_turns_are_text():
    processor = shared("chatml")
    made = processed(processor, [{"role": "system", "content": "Be terse."}, *chat(QUESTION, ANSWER)])
    wanted = f"<|im_start|>system\nBe terse.<|im_end|>\n<|im_start|>user\n\n{QUESTION}<|im_end|>\n\n"
    assert seen(processor, made) == wanted


def test_text_without_a_template_is_all_visible():
    processor = shared("chatml")
    made = processor(text="<image> which colour", images=Image.new("RGB", (24, 24)), return_tensors="pt")
    assert made["mm_token_type_ids"].tolist()[0] == [1] * tiny.NUM_PATCHES + [3] * (
        made["input_ids"].shape[1] - tiny.NUM_PATCHES
    )


def test_a_turn_cut_short_is_not_visible():
    answer = AnswerTokens((5, 6), 9)
    assert mark_visible([1, 5, 6, 2, 3], answer, 0) == [3, 0, 0, 0, 0]
    assert mark_visible([1, 5, 6], answer, 0) == [3, 0, 0]
    assert mark_visible([1, 5, 6, 2, 9, 4, 5, 6, 5, 6, 9, 5], answer, 0) == [3, 0, 0, 0, 0, 3, 0, 0, 0, 0, 0, 3]
    assert mark_visible([0, 0, 1, 0, 4, 0], answer, 0) == [0, 0, 3, 3, 3, 0]
    assert mark_visible([1, 5, 6, 2, 9, 4], AnswerTokens((5, 6), None), 0) == [3, 0, 0, 0, 0, 0]
    assert mark_visible([], answer, 0) == []


def test_it_is_off_unless_asked_for_and_saved(tmp_path):
    plain = models.processor()
    assert set(processed(plain, chat(QUESTION, ANSWER))["mm_token_type_ids"].flatten().tolist()) == {0, 1}
    marking().save_pretrained(tmp_path)
    again = AutoProcessor.from_pretrained(tmp_path)
    assert again.marks_visible_text
    conversation = chat(QUESTION, ANSWER)
    for one in (again, pickle.loads(pickle.dumps(again))):
        assert torch.equal(
            processed(one, conversation)["mm_token_type_ids"], processed(marking(), conversation)["mm_token_type_ids"]
        )


def test_lists_and_tensors_are_marked_alike():
    processor, conversation = shared("chatml"), chat(QUESTION, ANSWER)
    lists = processed(processor, conversation, return_tensors=None)
    assert lists["mm_token_type_ids"] == processed(processor, conversation)["mm_token_type_ids"].tolist()


def test_the_same_processor_follows_a_change_of_its_template():
    processor = marking()
    assert find_answer_tokens(processor).closer == processor.tokenizer.convert_tokens_to_ids("<|im_end|>")
    processor.chat_template = marking(TEMPLATES["llama2"]).chat_template
    assert find_answer_tokens(processor).closer == processor.tokenizer.convert_tokens_to_ids("</s>")


def test_raises_when_there_is_no_template():
    processor = marking()
    processor.chat_template = None
    with pytest.raises(ValueError, match="has no chat template, by which the assistant's turns are told"):
        processor(text="which colour")


def test_raises_when_nothing_stands_before_an_answer():
    processor = marking()
    processor.chat_template = "{% for m in messages %}{{ m['content'][-1]['text'] }}{% endfor %}"
    with pytest.raises(ValueError, match="writes no tokens before an answer"):
        processor(text="which colour")


def test_raises_when_a_processor_has_audio_tokens():
    processor = marking()
    processor.audio_token_id = 7
    with pytest.raises(ValueError, match="has audio tokens"):
        processor(text="which colour")


HOST_CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ IMAGE }}{% else %}{{ part['text'] }}{% endif %}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.mark.parametrize("family", ["qwen2_5_vl", "internvl"])
def test_a_hosts_processor_can_be_made_to_mark(family):
    processor = hosts.processor(family)
    processor.chat_template = HOST_CHATML.replace("IMAGE", repr(hosts.HOSTS[family].place))
    marked = mark_visible_text(processor)
    assert marked is processor
    assert type(marked).__name__ == hosts.HOSTS[family].processor
    made = processed(marked, chat(QUESTION, ANSWER, FURTHER, LAST))
    text = seen(marked, made)
    assert QUESTION in text
    assert FURTHER in text
    assert ANSWER not in text
    assert LAST not in text
    assert mark_visible_text(models.processor()).marks_visible_text
