"""The demo's parents: refused when untrained, loadable as any downloaded model when they pass."""

import numpy as np
import pytest
import torch
from transformers import AutoImageProcessor, AutoModel, AutoModelForCausalLM, AutoTokenizer

from modeling_vlmoe.finetune.demo.parents import (
    LESSONS,
    conversation,
    encode_chats,
    pretrain_text,
    pretrain_vision,
    require_accuracy,
    train_tokenizer,
    write_lesson,
)
from modeling_vlmoe.finetune.demo.scenes import all_scenes, render
from modeling_vlmoe.finetune.demo.settings import DemoSettings


@pytest.fixture
def settings():
    return DemoSettings(
        text_hidden_size=32,
        text_num_layers=1,
        text_intermediate_size=64,
        text_num_documents=300,
        text_steps=4,
        text_batch_size=8,
        vision_hidden_size=32,
        vision_num_layers=2,
        vision_intermediate_size=64,
        vision_num_images=32,
        vision_steps=3,
        vision_batch_size=8,
        num_test=50,
    )


@pytest.mark.parametrize(("parent", "name"), [("text", "LLM"), ("vision", "ViT")])
def test_raises_when_a_parent_is_untrained(parent, name, settings, tmp_path):
    with pytest.raises(ValueError, match=f"The demo's {name} reaches 0.* expected at least 0.950"):
        {"text": pretrain_text, "vision": pretrain_vision}[parent](tmp_path / parent, settings)
    assert not (tmp_path / parent).exists()


def test_accepts_a_parent_at_the_minimum():
    require_accuracy("LLM", 0.95, 0.95, "text_steps")


def test_saved_llm_loads_through_the_auto_classes(settings, tmp_path):
    settings.min_parent_accuracy = 0.0
    pretrain_text(tmp_path, settings)
    tokenizer, model = AutoTokenizer.from_pretrained(tmp_path), AutoModelForCausalLM.from_pretrained(tmp_path)
    assert (model.config.model_type, len(tokenizer)) == ("qwen3", model.config.vocab_size)
    chat = [{"role": "user", "content": [{"type": "text", "text": "What colour is the circle?"}]}]
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    text = tokenizer.decode(inputs["input_ids"][0])
    assert text == "<|im_start|>user\nWhat colour is the circle?<|im_end|>\n<|im_start|>assistant\n"
    assert model.generate(**inputs, max_new_tokens=2, do_sample=False).shape[1] > inputs["input_ids"].shape[1]


def test_saved_vit_loads_through_the_auto_classes(settings, tmp_path):
    settings.min_parent_accuracy = 0.0
    pretrain_vision(tmp_path, settings)
    processor, model = AutoImageProcessor.from_pretrained(tmp_path), AutoModel.from_pretrained(tmp_path)
    pixels = processor([render(all_scenes()[0], np.random.default_rng(0))], return_tensors="pt")["pixel_values"]
    assert pixels.shape == (1, 3, 48, 48)
    with torch.no_grad():
        hidden = model(pixel_values=pixels).last_hidden_state
    assert (model.config.model_type, tuple(hidden.shape)) == ("siglip_vision_model", (1, 16, 32))


def test_only_the_assistants_words_are_labels():
    documents = write_lesson(all_scenes(), LESSONS[-1], 200, np.random.default_rng(0))
    tokenizer = train_tokenizer(documents)
    [(input_ids, labels)] = encode_chats(tokenizer, [conversation(" top-left-empty", "Where is it?", "top-left")])
    assert tokenizer.decode([token for token in labels if token >= 0]) == "top-left<|im_end|>"
    assert len(input_ids) == len(labels)


def test_a_cell_is_one_word_to_the_tokenizer():
    documents = [d for lesson in LESSONS for d in write_lesson(all_scenes(), lesson, 2000, np.random.default_rng(0))]
    tokenizer = train_tokenizer(documents)
    assert len(tokenizer.tokenize(" top-left-red-circle bottom-right-empty")) == 2


def test_lessons_are_the_whole_training():
    assert sum(lesson.share for lesson in LESSONS) == pytest.approx(1.0)
