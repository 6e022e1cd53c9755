"""A folder that is sparse in place names every class of its processor: transformers goes by the model's type where no
file does, and for some types whatever a tokenizer's file says.
"""

import json

import pytest
from transformers import AutoProcessor, AutoTokenizer, is_torchvision_available

from modeling_vlmoe.conversion import ProofError, UpcycleArguments, host_processor_classes, upcycle
from modeling_vlmoe.conversion.host_processor_classes import name_video_class
from tests import hosts

TEXT = "in 2020: HTTPServer, हिन्दी, l'été"


def edit(file, **values):
    found = json.loads(file.read_text()) | values
    file.write_text(json.dumps({name: value for name, value in found.items() if value is not None}))


def made(dense, folder):
    return upcycle(UpcycleArguments(vlm_model=str(dense), text_experts=4, output_dir=str(folder)))


def split_digits(folder):
    """SmolVLM's Hub folders name a class that does not split digits; transformers goes by the model's type there."""
    edit(folder / "tokenizer_config.json", tokenizer_class="GPT2Tokenizer")
    rules = json.loads((folder / "tokenizer.json").read_text())
    digits = {"type": "Digits", "individual_digits": True}
    rules["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [digits, rules["pre_tokenizer"]]}
    (folder / "tokenizer.json").write_text(json.dumps(rules))


def name_an_older_class(folder):
    edit(folder / "tokenizer_config.json", tokenizer_class="Qwen2Tokenizer")


def name_a_class_of_sentencepiece(folder):
    """LLaVA-NeXT's name LlamaTokenizer, which would put its own marks of spaces in."""
    edit(folder / "tokenizer_config.json", tokenizer_class="LlamaTokenizer")
    rules = json.loads((folder / "tokenizer.json").read_text())
    rules["pre_tokenizer"] = {"type": "WhitespaceSplit"}
    (folder / "tokenizer.json").write_text(json.dumps(rules))


def name_no_class(folder):
    edit(folder / "tokenizer_config.json", tokenizer_class=None)


CHANGES = {
    "smolvlm": split_digits,
    "qwen3_5": name_an_older_class,
    "llava_next": name_a_class_of_sentencepiece,
    "qwen2_vl": name_no_class,
}


@pytest.mark.parametrize("family", CHANGES)
def test_a_tokenizer_splits_texts_as_beside_the_dense_model(family, tmp_path):
    dense = hosts.save(tmp_path / "dense", family)
    CHANGES[family](dense)
    before, after = (AutoTokenizer.from_pretrained(one) for one in (dense, made(dense, tmp_path / "sparse")))
    assert type(before) is type(after)
    assert after.tokenize(TEXT) == before.tokenize(TEXT)
    if family == "llava_next" or is_torchvision_available():  # the others have a video part
        assert AutoProcessor.from_pretrained(tmp_path / "sparse").tokenizer.tokenize(TEXT) == before.tokenize(TEXT)
    copied = json.loads((tmp_path / "sparse" / "tokenizer_config.json").read_text())
    wanted = json.loads((dense / "tokenizer_config.json").read_text()) | {"tokenizer_class": type(before).__name__}
    assert copied == wanted
    assert (tmp_path / "sparse" / "tokenizer.json").read_bytes() == (dense / "tokenizer.json").read_bytes()


def test_raises_when_another_tokenizer_is_written(tmp_path, monkeypatch):
    dense = hosts.save(tmp_path / "dense", "smolvlm")
    split_digits(dense)
    monkeypatch.setattr(host_processor_classes, "TOKENIZER_CLASS", "tokenizer_klass")
    with pytest.raises(ProofError, match=r"The tokenizer that was written .* does not split texts as its parent's"):
        made(dense, tmp_path / "sparse")
    assert not (tmp_path / "sparse").exists()


@pytest.mark.parametrize(
    ("image_class", "named"),
    [("GotOcr2ImageProcessor", "InternVLVideoProcessor"), ("Qwen2VLImageProcessor", None)],
    ids=["no video processor of that name", "told by the image processor"],
)
def test_a_video_processor_that_no_file_names_is_named(image_class, named, tmp_path):
    """Older folders of InternVL have no file that names it."""
    file = tmp_path / "preprocessor_config.json"
    file.write_text(json.dumps({"image_processor_type": image_class}))
    name_video_class(tmp_path, None, "internvl")
    assert json.loads(file.read_text()).get("video_processor_type") == named


def test_an_older_folder_of_internvl_keeps_its_processors(tmp_path):
    dense = hosts.save(tmp_path / "dense", "internvl")
    whole = json.loads((dense / "processor_config.json").read_text())
    images = whole.pop("image_processor") | {"image_processor_type": "GotOcr2ImageProcessor"}
    whole.pop("video_processor", None)
    (dense / "processor_config.json").write_text(json.dumps(whole))
    (dense / "preprocessor_config.json").write_text(json.dumps(images))
    written = json.loads((made(dense, tmp_path / "sparse") / "preprocessor_config.json").read_text())
    assert written == images | {"video_processor_type": "InternVLVideoProcessor"}
    if is_torchvision_available():
        assert (
            type(AutoProcessor.from_pretrained(tmp_path / "sparse").video_processor).__name__
            == "InternVLVideoProcessor"
        )
