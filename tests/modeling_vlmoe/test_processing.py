"""One processor over any image processor and tokenizer: counts, masks, refusals, and the way to disk and back."""

import inspect
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import modeling_vlmoe
from modeling_vlmoe.processing_vlmoe import VLMoEProcessor
from tests import tiny
from tests.modeling_vlmoe.pictures_and_chats import NUM_IMAGE_TOKENS, chat, image, text_part

# Building


def test_from_parents_leaves_the_callers_tokenizer_alone():
    tokenizer = tiny.tokenizer()
    tokenizer.pad_token = None
    before = (len(tokenizer), tokenizer.chat_template, tokenizer.all_special_tokens, tokenizer.pad_token)
    processor = VLMoEProcessor.from_parents(tiny.image_processor("clip"), tokenizer, NUM_IMAGE_TOKENS)
    assert (len(tokenizer), tokenizer.chat_template, tokenizer.all_special_tokens, tokenizer.pad_token) == before
    assert len(processor.tokenizer) == len(tokenizer) + 1
    assert processor.image_token_id == len(tokenizer)
    assert "<image>" in processor.tokenizer.all_special_tokens
    assert processor.tokenizer.chat_template == processor.chat_template


def test_from_parents_keeps_ids_and_special_tokens():
    tokenizer = tiny.tokenizer()
    tokenizer.add_special_tokens({"extra_special_tokens": ["<tool>"]})
    processor = VLMoEProcessor.from_parents(tiny.image_processor("clip"), tokenizer, NUM_IMAGE_TOKENS)
    assert processor.tokenizer.convert_tokens_to_ids(["<tool>", "<s>"]) == tokenizer.convert_tokens_to_ids(
        ["<tool>", "<s>"]
    )
    assert {"<tool>", "<image>"} <= set(processor.tokenizer.all_special_tokens)
    text = "what <s>colour<tool> is it"
    assert processor(text=text)["input_ids"][0] == tokenizer(text)["input_ids"]


def test_an_image_token_of_the_vocabulary_keeps_its_id():
    tokenizer = tiny.tokenizer()
    tokenizer.add_tokens(["<image>"])
    processor = VLMoEProcessor.from_parents(tiny.image_processor("clip"), tokenizer, NUM_IMAGE_TOKENS)
    assert len(processor.tokenizer) == len(tokenizer)
    assert processor.image_token_id == tokenizer.convert_tokens_to_ids("<image>")
    assert "<image>" in processor.tokenizer.all_special_tokens


def test_the_tokenizers_own_image_token_goes_first(tmp_path):
    tokenizer = tiny.tokenizer()
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|image_pad|>"]})
    tokenizer.save_pretrained(tmp_path)
    tokenizer = type(tokenizer).from_pretrained(tmp_path, extra_special_tokens={"image_token": "<|image_pad|>"})
    processor = VLMoEProcessor.from_parents(tiny.image_processor("clip"), tokenizer, NUM_IMAGE_TOKENS)
    assert processor.image_token == "<|image_pad|>"
    assert len(processor.tokenizer) == len(tokenizer)
    messages = [{"role": "user", "content": [{"type": "image"}, text_part("What?")]}]
    assert "<|image_pad|>\nWhat?" in processor.apply_chat_template(messages)


def test_eos_pads_where_there_is_no_pad_token(caplog):
    tokenizer = tiny.tokenizer()
    tokenizer.pad_token = None
    processor = VLMoEProcessor.from_parents(tiny.image_processor("clip"), tokenizer, NUM_IMAGE_TOKENS)
    assert processor.tokenizer.pad_token == tokenizer.eos_token
    assert "no pad token" in caplog.text


def test_raises_when_nothing_can_pad():
    tokenizer = tiny.tokenizer()
    tokenizer.pad_token = tokenizer.eos_token = None
    with pytest.raises(ValueError, match=re.escape("Set tokenizer.pad_token")):
        VLMoEProcessor.from_parents(tiny.image_processor("clip"), tokenizer, NUM_IMAGE_TOKENS)


def test_default_template_closes_answers_with_eos():
    processor = VLMoEProcessor.from_parents(tiny.image_processor("clip"), tiny.tokenizer(None), NUM_IMAGE_TOKENS)
    messages = [
        {"role": "user", "content": [{"type": "image"}, text_part("What?")]},
        {"role": "assistant", "content": "A circle."},
    ]
    assert processor.apply_chat_template(messages) == "User: <image>\nWhat?\nAssistant: A circle.<|im_end|>\n"
    prompt = processor.apply_chat_template(messages[:1], add_generation_prompt=True)
    assert prompt == "User: <image>\nWhat?\nAssistant:"


def test_raises_when_no_template_and_no_eos():
    tokenizer = tiny.tokenizer(None)
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="neither a chat template nor an EOS token"):
        VLMoEProcessor.from_parents(tiny.image_processor("clip"), tokenizer, NUM_IMAGE_TOKENS)


def test_of_named_templates_the_default_is_taken():
    build = VLMoEProcessor.from_parents
    parts = tiny.image_processor("clip"), tiny.tokenizer(), NUM_IMAGE_TOKENS
    named = {"default": tiny.CHATML, "tool_use": "{{ messages }}"}
    assert build(*parts, chat_template=named).chat_template == build(*parts).chat_template
    with pytest.raises(ValueError, match=re.escape("['rag', 'tool_use'], and none of them is named")):
        build(*parts, chat_template={"tool_use": tiny.CHATML, "rag": tiny.CHATML})


@pytest.mark.parametrize("number", [None, 0, -1, 2.5, True, "9"])
def test_raises_when_the_number_of_image_tokens_is_unusable(number):
    with pytest.raises(ValueError, match=f"num_image_tokens is {number!r}, but has to be a whole number"):
        VLMoEProcessor.from_parents(tiny.image_processor("clip"), tiny.tokenizer(), number)


def test_raises_when_the_tokenizer_has_no_image_token():
    with pytest.raises(ValueError, match=r"no single token '<image>'.*from_parents"):
        VLMoEProcessor(tiny.image_processor("clip"), tiny.tokenizer(), num_image_tokens=NUM_IMAGE_TOKENS)


# Text and images


@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_mixed_batches_have_one_place_per_image_feature(processor, padding_side):
    texts = ["no picture here", "<image>\nwhat is it?", "<image><image>\ncompare", "<image> then <image> then <image>"]
    counts = (0, 1, 2, 3)
    images = [[image(10 * row + column) for column in range(count)] for row, count in enumerate(counts)]
    inputs = processor(text=texts, images=images, padding=True, padding_side=padding_side, return_tensors="pt")
    assert set(inputs) == {"input_ids", "attention_mask", "mm_token_type_ids", "pixel_values"}
    assert inputs["pixel_values"].shape == (6, 3, tiny.IMAGE_SIZE, tiny.IMAGE_SIZE)
    is_image = inputs["input_ids"] == processor.image_token_id
    assert is_image.sum(-1).tolist() == [count * NUM_IMAGE_TOKENS for count in counts]
    torch.testing.assert_close(inputs["mm_token_type_ids"], is_image.long())
    pad = inputs["attention_mask"] == 0
    assert pad[0, 0 if padding_side == "left" else -1]
    assert (inputs["input_ids"][pad] == processor.tokenizer.pad_token_id).all()
    for row, text in enumerate(texts):
        alone = processor(text=text, images=images[row] or None, return_tensors="pt")
        torch.testing.assert_close(inputs["input_ids"][row][~pad[row]], alone["input_ids"][0])
    last = processor(text=texts[3], images=images[3], return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(inputs["pixel_values"][3:], last)


def test_text_alone_gives_no_pixels(processor):
    for images in (None, [], [[], []]):
        inputs = processor(text=["one", "two"], images=images)
        assert set(inputs) == {"input_ids", "attention_mask", "mm_token_type_ids"}


def test_none_stands_for_a_samples_images_where_others_have_some(processor):
    """As Arrow gives a missing list, and TRL's GRPO trainer a text-only prompt."""
    texts = ["<image> what?", "no picture"]
    found, wanted = (
        processor(text=texts, images=[[image()], none], padding=True, return_tensors="pt") for none in (None, [])
    )
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=0)
    with pytest.raises(ValueError, match="Not an image: None"):
        processor(text=["<image> a", "<image> b"], images=[image(), None])


def test_type_ids_can_be_left_out(processor):
    assert "mm_token_type_ids" not in processor(text="one", return_mm_token_type_ids=False)


def test_images_of_any_mode_and_kind_are_read(clip_processor, tmp_path):
    image().save(tmp_path / "a.png")
    sources = [image().convert(mode) for mode in ("L", "P", "RGBA", "CMYK")]
    sources += [str(tmp_path / "a.png"), tmp_path / "a.png", np.asarray(image()), torch.zeros(3, 30, 40)]
    for source in sources:
        inputs = clip_processor(text="<image>", images=source, return_tensors="pt")
        assert inputs["pixel_values"].shape == (1, 3, tiny.IMAGE_SIZE, tiny.IMAGE_SIZE)


def test_counts_asked_by_serving_equal_those_made(processor):
    sizes = [(30, 40), (24, 24), (100, 7)]
    data = processor._get_num_multimodal_tokens(image_sizes=sizes)
    assert data.num_image_patches == [1, 1, 1]
    for (height, width), count in zip(sizes, data.num_image_tokens, strict=True):
        inputs = processor(text="<image>", images=image(size=(width, height)))
        assert inputs["input_ids"][0].count(processor.image_token_id) == count
    assert processor._get_num_multimodal_tokens().num_image_tokens is None


def test_offsets_of_replaced_tokens_come_from_the_host(clip_processor):
    inputs = clip_processor(text="a <image>", images=image(), return_text_replacement_offsets=True)
    ((offset,),) = inputs["text_replacement_offsets"]
    assert offset["span"] == (2, 9)
    assert offset["replacement"] == "<image>" * NUM_IMAGE_TOKENS


def test_input_names_are_those_returned(processor):
    names = processor.model_input_names
    assert set(names) == {"input_ids", "attention_mask", "mm_token_type_ids", "pixel_values"}


@pytest.mark.parametrize("head", ["VLMoEModel", "VLMoEForConditionalGeneration", "VLMoEForSequenceClassification"])
def test_every_head_names_what_the_processor_returns(processor, head):
    """`generate` refuses a key that `forward` takes by its `**kwargs` only."""
    named = inspect.signature(getattr(modeling_vlmoe, head).forward).parameters
    assert set(processor(text="<image>", images=image())) <= set(named)


def test_inputs_that_the_model_does_not_take_are_left_out():
    tokenizer = tiny.tokenizer()
    tokenizer.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    processor = VLMoEProcessor.from_parents(tiny.image_processor("clip"), tokenizer, NUM_IMAGE_TOKENS)
    inputs = processor(text="<image>", images=image())
    assert set(inputs) == {"input_ids", "attention_mask", "mm_token_type_ids", "pixel_values"}
    assert set(inputs) == set(processor.model_input_names)


# Refusals


@pytest.mark.parametrize(
    ("text", "images", "message"),
    [
        ("<image><image>", [image()], "Found total 2 <image> tokens and 1 images"),
        ("none", [image()], "Found total 0 <image> tokens and 1 images"),
        ("<image>", None, "Found 1 <image> tokens in the text but no images"),
        (["<image>", "<image>"], [[image(), image()], []], "Sample 0 has 1 <image> tokens in its text and 2 images"),
    ],
)
def test_raises_when_images_and_tokens_differ_in_number(clip_processor, text, images, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        clip_processor(text=text, images=images)


def test_raises_when_truncation_cuts_an_image(processor):
    with pytest.raises(ValueError, match=r"(?s)truncation.*increase `max_length`"):
        processor(text="hi <image>", images=image(), truncation=True, max_length=5)
    cut = processor(text="<image> what colour is the shape", images=image(), truncation=True, max_length=12)
    assert len(cut["input_ids"][0]) == 12


def broken_files(folder: Path) -> dict[str, Path]:
    image(size=(300, 300)).save(folder / "whole.png")
    (folder / "cut.png").write_bytes((folder / "whole.png").read_bytes()[:5000])
    (folder / "text.png").write_text("this is text")
    (folder / "empty.png").write_bytes(b"")
    return {name: folder / f"{name}.png" for name in ("cut", "text", "empty", "missing")}


@pytest.mark.parametrize("name", ["cut", "text", "empty", "missing"])
@pytest.mark.parametrize("key", ["path", "url", "image"])
def test_raises_when_an_image_file_cannot_be_read(clip_processor, tmp_path, name, key):
    path = str(broken_files(tmp_path)[name])
    with pytest.raises(ValueError, match=rf"Cannot read the image {re.escape(path)}: .*Check the path"):
        clip_processor(text=["<image>"], images=[path])
    messages = [{"role": "user", "content": [{"type": "image", key: path}, text_part("What?")]}]
    with pytest.raises(ValueError, match=rf"Cannot read the image {re.escape(path)}: "):
        clip_processor.apply_chat_template(messages, tokenize=True, return_dict=True)


def test_raises_when_an_opened_image_is_cut_off(clip_processor, tmp_path):
    path = broken_files(tmp_path)["cut"]
    with Image.open(path) as opened, pytest.raises(ValueError, match=rf"Cannot read the image {re.escape(str(path))}"):
        clip_processor(text="<image>", images=opened)


@pytest.mark.parametrize("source", [3, b"bytes", {"bytes": b"", "path": None}, None, np.zeros(5)], ids=repr)
def test_raises_when_it_is_no_image_at_all(clip_processor, source):
    with pytest.raises(ValueError, match=rf"Not an image: .* of type {type(source).__name__}"):
        clip_processor(text="<image>", images=[source])


def test_raises_when_a_base64_string_is_no_image(clip_processor):
    with pytest.raises(ValueError, match="Cannot read the image data:image/png;base64,AAAA") as caught:
        clip_processor(text="<image>", images="data:image/png;base64," + "AAAA" * 1000)
    assert len(str(caught.value)) < 1000


def test_raises_when_given_videos(clip_processor):
    with pytest.raises(ValueError, match="not videos or audio"):
        clip_processor(text="hi", videos=np.zeros((2, 3, 8, 8)))


def test_raises_when_the_image_processor_gives_unlike_sizes():
    image_processor = tiny.image_processor("clip")
    image_processor.do_center_crop = False
    processor = VLMoEProcessor.from_parents(image_processor, tiny.tokenizer(), NUM_IMAGE_TOKENS)
    with pytest.raises(ValueError, match=r"one size. Set the image processor's size"):
        processor(text="<image><image>", images=[image(), image(size=(80, 30))])


# To disk and back


def written(folder: Path) -> dict[str, object]:
    """A folder's files; transformers' tokenizers add where they were loaded from, once."""
    files: dict[str, object] = {path.name: path.read_bytes() for path in folder.iterdir()}
    tokenizer = json.loads((folder / "tokenizer_config.json").read_text())
    files["tokenizer_config.json"] = {k: v for k, v in tokenizer.items() if k not in ("is_local", "local_files_only")}
    return files


def test_round_trip_gives_the_same_files_and_inputs(processor, tmp_path):
    processor.save_pretrained(tmp_path / "a")
    again = VLMoEProcessor.from_pretrained(tmp_path / "a")
    again.save_pretrained(tmp_path / "b")
    files = written(tmp_path / "a")
    assert {"processor_config.json", "tokenizer.json", "chat_template.jinja"} <= set(files)
    assert written(tmp_path / "b") == files
    assert json.loads((tmp_path / "a" / "processor_config.json").read_text())["num_image_tokens"] == NUM_IMAGE_TOKENS
    assert again.chat_template == again.tokenizer.chat_template == processor.chat_template
    assert again.image_token_id == processor.image_token_id
    before, after = (
        each.apply_chat_template(chat(image()), tokenize=True, return_dict=True, return_tensors="pt")
        for each in (processor, again)
    )
    for key, value in before.items():
        torch.testing.assert_close(after[key], value)


def test_a_reloaded_template_takes_what_arrow_makes_of_a_chat(processor, tmp_path):
    """Through a parquet file: `datasets` gives all parts the same keys, None where a part has no such."""
    import datasets

    image().save(tmp_path / "a.png")
    image_part = {"type": "image", "image": str(tmp_path / "a.png")}
    plain = [{"role": "user", "content": [image_part, text_part("what colour is the shape?")]}]
    plain += [{"role": "assistant", "content": [text_part("the red circle")]}]
    datasets.Dataset.from_list([{"messages": plain}]).to_parquet(tmp_path / "chat.parquet")
    row = datasets.Dataset.from_parquet(str(tmp_path / "chat.parquet"), cache_dir=str(tmp_path / "cache"))[0]
    assert row["messages"] != plain
    assert row["messages"][0]["content"][1]["image"] is None

    processor.save_pretrained(tmp_path / "saved")
    assert "{%- generation -%}" in (tmp_path / "saved" / "chat_template.jinja").read_text()
    again = VLMoEProcessor.from_pretrained(tmp_path / "saved")
    options = {"tokenize": True, "return_dict": True, "return_tensors": "pt", "return_assistant_tokens_mask": True}
    found, wanted = (
        again.apply_chat_template(row["messages"], **options),
        processor.apply_chat_template(plain, **options),
    )
    assert set(found) == set(wanted)
    for key, value in wanted.items():
        torch.testing.assert_close(found[key], value, atol=0, rtol=0)
    assert again.decode(found["input_ids"][0][found["assistant_masks"][0].bool()]) == "the red circle<|im_end|>"


def test_processors_pickle(clip_processor):
    again = pickle.loads(pickle.dumps(clip_processor))
    assert (
        again(text="<image>", images=image())["input_ids"]
        == clip_processor(text="<image>", images=image())["input_ids"]
    )


def test_saved_folder_loads_without_the_package(tmp_path, monkeypatch):
    """Only the saved folder: the code in it, found by its auto_map, in a process that cannot import modeling_vlmoe."""
    monkeypatch.setattr(VLMoEProcessor, "_auto_class", "AutoProcessor")
    processor = VLMoEProcessor.from_parents(tiny.image_processor("siglip"), tiny.tokenizer(), NUM_IMAGE_TOKENS)
    processor.save_pretrained(tmp_path / "saved")
    saved = json.loads((tmp_path / "saved" / "processor_config.json").read_text())
    assert saved["auto_map"] == {"AutoProcessor": "processing_vlmoe.VLMoEProcessor"}
    assert {"processing_vlmoe.py", "chat_templates.py"} <= set(os.listdir(tmp_path / "saved"))
    shutil.copytree(tmp_path / "saved", tmp_path / "downloaded")
    image().save(tmp_path / "cat.png")
    script = f"""
import sys
sys.modules["modeling_vlmoe"] = None  # importing it raises ImportError
from transformers import AutoProcessor
processor = AutoProcessor.from_pretrained({str(tmp_path / "downloaded")!r}, trust_remote_code=True)
assert type(processor).__name__ == "VLMoEProcessor", type(processor)
content = [{{"type": "image", "path": {str(tmp_path / "cat.png")!r}}}, {{"type": "text", "text": "What?"}}]
inputs = processor.apply_chat_template([{{"role": "user", "content": content}}], tokenize=True, return_dict=True)
assert inputs["input_ids"][0].count(processor.image_token_id) == {NUM_IMAGE_TOKENS}
processor.save_pretrained({str(tmp_path / "again")!r})
"""
    environment = os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    environment.pop("PYTHONPATH", None)
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path, env=environment, check=False
    )
    assert result.returncode == 0, result.stderr
    again = json.loads((tmp_path / "again" / "processor_config.json").read_text())
    assert again["auto_map"] == saved["auto_map"]
    assert {"processing_vlmoe.py", "chat_templates.py"} <= set(os.listdir(tmp_path / "again"))
