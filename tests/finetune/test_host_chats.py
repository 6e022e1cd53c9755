"""Batches for a host's own processor: labels on the answers' tokens alone, found in the host's own chat template."""

import pickle

import pytest
import torch
from PIL import Image

from modeling_vlmoe.finetune import ChatCollator
from modeling_vlmoe.finetune.collator import check_rows, count_tokens
from modeling_vlmoe.finetune.data import image_size
from modeling_vlmoe.finetune.evaluation import generate_answers
from modeling_vlmoe.finetune.host_chats import HostChats, as_parts
from modeling_vlmoe.finetune.rows import conversation
from tests import hosts
from tests.finetune.host_rows import CHATML, IMAGE, mixed_rows, processor, row, said, template

# Mistral-3's own processor needs torchvision; PaliGemma's writes around the text it is given.
FAMILIES = [family for family in hosts.HOSTS if family not in ("mistral3", "paligemma")]
TRAINED = ["qwen2_5_vl", "smolvlm", "llava_next", "gemma3"]
MODEL_INPUTS = {
    "qwen2_5_vl": {"pixel_values", "image_grid_thw", "mm_token_type_ids"},
    "smolvlm": {"pixel_values", "pixel_attention_mask"},
    "llava_next": {"pixel_values", "image_sizes"},
    "gemma3": {"pixel_values", "token_type_ids"},
}


def spoken(made, given):
    """The oracle: the host's own ids of each conversation up to an answer, and with it, one behind the other."""
    messages, found = as_parts(conversation(given)), []

    def ids(part, has_prompt):
        encoded = made.apply_chat_template(
            [part], add_generation_prompt=has_prompt, tokenize=True, return_dict=True, return_tensors="pt"
        )
        return encoded["input_ids"][0]

    whole = ids(messages, False)
    labels = torch.full_like(whole, -100)
    for index, message in enumerate(messages):
        if message["role"] == "assistant":
            prompt, answered = ids(messages[:index], True), ids(messages[: index + 1], False)
            assert torch.equal(whole[: len(answered)], answered)
            end = made.tokenizer.eos_token_id
            last = max(place for place in range(len(answered)) if answered[place] == end) + 1  # not its line break
            labels[len(prompt) : last] = whole[len(prompt) : last]
            found.append(made.decode(whole[len(prompt) : last]))
    return whole, labels, found


@pytest.mark.parametrize("first", range(3))
@pytest.mark.parametrize("family", FAMILIES)
def test_labels_are_exactly_the_answers_tokens(family, first):
    """Whichever row comes first, the one without pictures too."""
    made, rows = processor(family), mixed_rows()
    answers = [["red\n\nand blue<|im_end|>", "the same: red<|im_end|>"], ["four<|im_end|>"], ["left<|im_end|>"]]
    rows, answers = rows[first:] + rows[:first], answers[first:] + answers[:first]
    batch = ChatCollator(made)(rows)
    for index, (given, wanted) in enumerate(zip(rows, answers, strict=True)):
        ids, labels, found = spoken(made, given)
        is_real = batch["attention_mask"][index].bool()
        assert found == wanted
        assert torch.equal(batch["input_ids"][index][is_real], ids)
        assert torch.equal(batch["labels"][index][is_real], labels)
        assert (batch["labels"][index][~is_real] == -100).all()


@pytest.mark.parametrize("family", FAMILIES)
def test_the_two_ways_to_find_answers_agree(family):
    """By characters of the one call, and by processed prompts, where a processor does not say where images went."""
    made, given = processor(family), mixed_rows()[0]
    chats, messages = HostChats(made), as_parts(conversation(given))
    batch = ChatCollator(made)([given])
    text = chats.render(messages)
    learnt = chats.behind_prompts(messages, text, chats.answers(messages, "it"), batch["input_ids"][0], "it")
    assert torch.equal(learnt, batch["labels"][0] != -100)


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_are_counted_as_the_processor_makes_them(family):
    made = processor(family)
    for given in [*mixed_rows(), *mixed_rows()]:
        length = ChatCollator(made)([given])["input_ids"].shape[1]
        assert count_tokens(given, made) == length
        check_rows([given], made, length)
        with pytest.raises(ValueError, match=rf"Row {given['row']} of the data is {length} tokens long"):
            check_rows([given], made, length - 1)


@pytest.mark.parametrize("family", TRAINED)
def test_a_mixed_batch_gives_its_rows_losses(family):
    made, model, rows = processor(family), hosts.model(family), mixed_rows()
    collator = ChatCollator(made)
    together = collator(rows)
    assert set(together) == {"input_ids", "attention_mask", "labels"} | MODEL_INPUTS[family]
    targets = (together["labels"] != -100).sum(-1)
    with torch.no_grad():
        alone = torch.stack([model(**collator([given])).loss for given in rows])
        whole = model(**together).loss
    torch.testing.assert_close(whole, (alone * targets).sum() / targets.sum(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", TRAINED)
def test_batched_answers_are_the_single_ones(family):
    made, model = processor(family), hosts.model(family)
    together = generate_answers(model, made, mixed_rows(), batch_size=3, max_new_tokens=4)
    assert together == generate_answers(model, made, mixed_rows(), batch_size=1, max_new_tokens=4)
    assert any(together)


def test_prompts_end_where_the_answer_begins():
    made, rows = processor("qwen2_5_vl"), mixed_rows()
    prompts, whole = ChatCollator(made, padding_side="left").prompts(rows), ChatCollator(made)(rows)
    for index in range(len(rows)):
        prompt = prompts["input_ids"][index][prompts["attention_mask"][index].bool()]
        assert torch.equal(prompt, whole["input_ids"][index][: len(prompt)])
        assert whole["labels"][index][len(prompt)] != -100


def test_an_image_in_the_answer_is_not_learnt():
    made = processor("gemma3")
    batch = ChatCollator(made)([row(1, [hosts.picture(1)], "draw", [said("here: "), IMAGE, said("done")])])
    learnt = made.decode(batch["labels"][0][batch["labels"][0] != -100])
    assert learnt.replace("\n", "") == "here: done<|im_end|>"


def test_a_template_without_a_prompt_has_what_follows_learnt():
    """What the model is asked for is what stands behind the question, the name of the role too."""
    made = hosts.processor("llava_next")
    batch = ChatCollator(made)(mixed_rows()[1:2])
    assert made.decode(batch["labels"][0][batch["labels"][0] != -100]) == "assistant: four"


@pytest.mark.parametrize("is_stored", [False, True])
def test_a_picture_on_its_side_is_counted_upright(tmp_path, is_stored):
    picture = hosts.picture(1, (64, 32))
    exif = picture.getexif()
    exif[274] = 6
    picture.save(tmp_path / "side.png", exif=exif)
    given = {"path": str(tmp_path / "side.png"), "bytes": (tmp_path / "side.png").read_bytes() if is_stored else None}
    assert image_size(given, "it") == image_size(Image.open(given["path"]), "it") == (32, 64)
    made, turned = processor("llava_next"), row(1, [given], [IMAGE, said("?")], "yes")
    batch = ChatCollator(made)([turned])
    assert batch["image_sizes"].tolist() == [[64, 32]]
    assert count_tokens(turned, made) == batch["input_ids"].shape[1]


def test_a_processor_without_videos_goes_to_another_process():
    made = processor("qwen2_5_vl")
    again = pickle.loads(pickle.dumps(made))
    assert again.chat_template == made.chat_template
    assert again.get_attributes() == made.get_attributes()


THINKS = "<|im_start|>assistant\n{% endif %}", "<|im_start|>assistant\n<think>\n{% endif %}"
FORGETS = "{{ part['text'] }}", "{{ part['text'] if loop.last and message == messages[-1] else '' }}"
REFUSALS = {
    "an image in the text": (CHATML, row(9, [], "what is <image>?", "b"), "Row 9 of the data has <image> in its text"),
    "the prompt is another": (
        CHATML.replace(*THINKS),
        row(9, [], "a", "b"),
        "Row 9 .* renders the prompt for message 2",
    ),
    "earlier turns change": (CHATML.replace(*FORGETS), row(9, [], "a", "b", "c", "d"), "Row 9 .* renders the prompt"),
    "no question": (
        CHATML,
        row(9, [], "a", "b") | {"messages": [{"role": "assistant", "content": "b"}]},
        "Row 9 .* beg",
    ),
    "the template refuses": (
        "{{ raise_exception('no') }}",
        row(9, [], "a", "b"),
        "Row 9 .* cannot render .* user.*: no",
    ),
    "there is none": (None, row(9, [], "a", "b"), r"The processor \(LlavaNextProcessor\) has no chat template"),
}


@pytest.mark.parametrize("check", [check_rows, lambda rows, made: ChatCollator(made)(rows)], ids=["start", "batch"])
@pytest.mark.parametrize("what", REFUSALS)
def test_raises_when_answers_cannot_be_found(what, check):
    text, given, message = REFUSALS[what]
    made = hosts.processor("llava_next")
    made.chat_template = text and template("llava_next", text)
    with pytest.raises(ValueError, match=message):
        check([given], made)


def test_raises_when_an_answer_changes_once_others_follow():
    """Reasoning that a template drops from earlier turns."""
    text = CHATML.replace(
        "{{ part['text'] }}",
        "{{ part['text'] if message == messages[-1] else part['text'].split('</think>')[-1] }}",
    )
    with pytest.raises(ValueError, match=r"Row 9 .* renders message 2, an answer, otherwise once others follow"):
        check_rows([row(9, [], "a", "<think>hm</think>b", "c", "d")], processor("llava_next", text))


def test_raises_when_the_processor_writes_around_the_text():
    with pytest.raises(ValueError, match=r"Row 3 .*PaliGemmaProcessor\) does not tokenise the beginning"):
        ChatCollator(processor("paligemma"))(mixed_rows()[2:])


def test_raises_when_images_are_too_many_for_the_template():
    """A template for text alone."""
    made = processor("llava_next", CHATML.replace("IMAGE", ""))
    with pytest.raises(ValueError, match=r"LlavaNextProcessor\) cannot read conversations with \[1\] images"):
        ChatCollator(made)(mixed_rows()[2:])
