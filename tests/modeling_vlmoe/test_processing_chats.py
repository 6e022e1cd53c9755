"""Chats through the processor: inputs, masks, templates."""

import pytest

from modeling_vlmoe.processing_vlmoe import VLMoEProcessor
from tests import tiny
from tests.modeling_vlmoe.pictures_and_chats import NUM_IMAGE_TOKENS, chat, image, text_part


def test_chat_in_arrows_form_gives_inputs_and_masks(processor):
    inputs = processor.apply_chat_template(
        chat(), tokenize=True, return_dict=True, return_tensors="pt", return_assistant_tokens_mask=True
    )
    ids, mask = inputs["input_ids"][0], inputs["assistant_masks"][0].bool()
    assert (ids == processor.image_token_id).sum() == NUM_IMAGE_TOKENS
    assert processor.tokenizer.decode(ids[mask]) == "the red circle<|im_end|>"
    assert inputs["pixel_values"].shape[0] == 1


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (
            "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}"
            "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}",
            "the red circle<|end|>",
        ),
        (
            "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token + '[INST] ' + m.content + ' [/INST]' }}"
            "{% else %}{{ ' ' + m.content + ' ' + eos_token }}{% endif %}{% endfor %}",
            " the red circle <|im_end|>",
        ),
        (None, " the red circle<|im_end|>"),
    ],
    ids=["phi3", "llama2", "default"],
)
def test_masks_cover_the_answer_and_its_end_on_tokens(template, expected):
    processor = VLMoEProcessor.from_parents(tiny.image_processor("clip"), tiny.tokenizer(template), NUM_IMAGE_TOKENS)
    inputs = processor.apply_chat_template(
        chat(), tokenize=True, return_dict=True, return_tensors="pt", return_assistant_tokens_mask=True
    )
    assert processor.tokenizer.decode(inputs["input_ids"][0][inputs["assistant_masks"][0].bool()]) == expected


def test_batched_chats_with_and_without_images(processor):
    plain = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": " hi there "}]
    two = [{"role": "user", "content": [{"type": "image", "image": image(i)} for i in (1, 2)] + [text_part("which?")]}]
    inputs = processor.apply_chat_template(
        [plain, chat(), two],
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        return_assistant_tokens_mask=True,
        processor_kwargs={"padding": True, "padding_side": "left"},
    )
    is_image = inputs["input_ids"] == processor.image_token_id
    assert is_image.sum(-1).tolist() == [0, NUM_IMAGE_TOKENS, 2 * NUM_IMAGE_TOKENS]
    marked = [
        processor.tokenizer.decode(ids[mask.bool()])
        for ids, mask in zip(inputs["input_ids"], inputs["assistant_masks"], strict=True)
    ]
    assert marked == [" hi there <|im_end|>", "the red circle<|im_end|>", ""]


def test_the_callers_messages_stay_as_they_are(clip_processor):
    messages = chat(picture := image())
    clip_processor.apply_chat_template(messages, tokenize=True, return_dict=True)
    assert messages == chat(picture)


def test_final_messages_can_be_continued(clip_processor):
    for content in ("the red ", [text_part("the red ")], [{"type": "text", "text": "the red ", "image": None}]):
        messages = [*chat()[:1], {"role": "assistant", "content": content}]
        text = clip_processor.apply_chat_template(messages, continue_final_message=True)
        assert text.endswith("<|im_start|>assistant\nthe red ")


def test_control_tokens_of_users_can_be_made_plain_text(clip_processor):
    messages = [{"role": "user", "content": [{"type": "image", "image": image()}, text_part("<image> <|im_end|>")]}]
    inputs = clip_processor.apply_chat_template(
        messages, tokenize=True, return_dict=True, sanitize_control_tokens=True
    )
    assert inputs["input_ids"][0].count(clip_processor.image_token_id) == NUM_IMAGE_TOKENS


def test_trl_finds_marks_and_a_trained_end_of_turn(processor):
    utils = pytest.importorskip("trl.chat_template_utils")
    assert utils.has_generation_markers(processor.chat_template)
    assert utils.is_chat_template_stop_token_trained(processor)
