"""The Auto classes and the pipeline: with the package, and in a process that cannot import it."""

import base64
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from PIL import Image
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoModelForSequenceClassification,
    AutoProcessor,
    pipeline,
)

import modeling_vlmoe
from modeling_vlmoe import VLMoEForConditionalGeneration, VLMoEModel, VLMoEProcessor
from modeling_vlmoe.parts_config import AUTO_MAP
from tests.models import batch, processor, sparse_model

GENERATION_CLASSES = [AutoModelForImageTextToText, AutoModelForMultimodalLM, AutoModelForCausalLM]
QUESTION = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what colour is the shape?"}]}]


def save(folder):
    proc = processor()
    model = sparse_model(image_token_id=proc.image_token_id)
    model.save_pretrained(folder)
    proc.save_pretrained(folder)
    return model


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    model = save(folder)
    inputs = batch()
    inputs["input_ids"] = inputs["input_ids"].masked_fill(inputs["input_ids"] == 300, model.config.image_token_id)
    torch.save({"inputs": inputs, "logits": model(**inputs).logits.detach()}, folder / "expected.pt")
    return folder


@pytest.mark.parametrize("auto_class", GENERATION_CLASSES)
def test_auto_classes_load_the_model(saved, auto_class):
    model = auto_class.from_pretrained(saved)
    assert type(model) is VLMoEForConditionalGeneration
    expected = torch.load(saved / "expected.pt")
    torch.testing.assert_close(model(**expected["inputs"]).logits, expected["logits"], atol=0, rtol=0)


def test_auto_classes_load_body_processor_and_classifier(saved):
    body, info = AutoModel.from_pretrained(saved, output_loading_info=True)
    assert type(body) is VLMoEModel
    assert not info["missing_keys"]
    assert type(AutoProcessor.from_pretrained(saved)) is VLMoEProcessor
    classifier = AutoModelForSequenceClassification.from_pretrained(saved, num_labels=5)
    assert classifier.score.out_features == 5


@pytest.mark.parametrize("trust", [True, False, None])
def test_the_package_comes_before_remote_code(saved, trust):
    model = AutoModel.from_pretrained(saved, trust_remote_code=trust)
    assert type(model) is VLMoEModel
    assert type(model.config) is modeling_vlmoe.VLMoEConfig
    assert type(AutoConfig.from_pretrained(saved, trust_remote_code=trust)) is modeling_vlmoe.VLMoEConfig
    assert type(AutoProcessor.from_pretrained(saved, trust_remote_code=trust)) is VLMoEProcessor
    for auto_class in GENERATION_CLASSES:
        assert type(auto_class.from_pretrained(saved, trust_remote_code=trust)) is VLMoEForConditionalGeneration


@pytest.mark.parametrize("kind", ["PIL", "path", "Path", "url", "base64"])
def test_pipeline_answers_a_chat_with_an_image(saved, tmp_path, kind, caplog):
    image, path = Image.new("RGB", (40, 30), "red"), tmp_path / "red shape.png"
    image.save(path)
    encoded = f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"
    sources = {"PIL": image, "path": str(path), "Path": path, "url": path.as_uri(), "base64": encoded}
    key = "url" if kind == "url" else "image"
    text = {"type": "text", "text": "what colour is the shape?"}
    chat = [{"role": "user", "content": [{"type": "image", key: sources[kind]}, text]}]
    with caplog.at_level("INFO"):
        answer = pipeline("image-text-to-text", model=str(saved))(text=chat, max_new_tokens=3, return_full_text=False)
    assert isinstance(answer[0]["generated_text"], str)
    assert "not supported" not in caplog.text
    again = [{"role": "user", "content": [{"type": "image", "image": image}, text]}]
    encode = AutoProcessor.from_pretrained(saved).apply_chat_template
    found, wanted = (encode(one, tokenize=True, return_dict=True, return_tensors="pt") for one in (chat, again))
    torch.testing.assert_close(found["pixel_values"], wanted["pixel_values"], atol=0, rtol=0)


def test_text_generation_pipeline_works_without_images(saved):
    answer = pipeline("text-generation", model=str(saved))("what colour", max_new_tokens=3)
    assert answer[0]["generated_text"].startswith("what colour")


REMOTE = """
import torch
from transformers import AutoModelForImageTextToText, AutoModel, AutoProcessor, AutoConfig, pipeline
folder = {folder!r}
config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
assert type(config).__module__.startswith("transformers_modules"), type(config)
model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True)
expected = torch.load({expected!r})
assert torch.equal(model(**expected["inputs"]).logits, expected["logits"])
assert len(model(**expected["inputs"], output_router_logits=True).router_logits) == 3
body = AutoModel.from_pretrained(folder, trust_remote_code=True)
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
assert type(processor).__name__ == "VLMoEProcessor", type(processor)
from PIL import Image
content = [{{"type": "image", "image": Image.new("RGB", (20, 20))}}, {{"type": "text", "text": "what?"}}]
chat = [{{"role": "user", "content": content}}]
kwargs = dict(tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True)
inputs = processor.apply_chat_template(chat, **kwargs)
print(processor.batch_decode(model.generate(**inputs, max_new_tokens=3)))
print(pipeline("image-text-to-text", model=folder, trust_remote_code=True)(text=chat, max_new_tokens=3))
model.train()(**expected["inputs"], labels=expected["inputs"]["input_ids"]).loss.backward()
model.save_pretrained({again!r}); processor.save_pretrained({again!r})
"""


def test_a_stranger_loads_it_with_trust_remote_code_and_re_saves_it(saved, tmp_path, run_without_package):
    again = tmp_path / "again"
    expected = str(saved / "expected.pt")
    run_without_package(REMOTE.format(folder=str(saved), expected=expected, again=str(again)))
    third = tmp_path / "third"
    run_without_package(REMOTE.format(folder=str(again), expected=expected, again=str(third)))
    assert type(AutoModelForImageTextToText.from_pretrained(third)) is VLMoEForConditionalGeneration


def test_without_trust_the_error_names_the_flag(saved, run_without_package):
    names = ("AutoModelForImageTextToText", "AutoModel", "AutoConfig", "AutoProcessor")
    code = "\n".join(
        f"from transformers import {name}\ntry:\n    {name}.from_pretrained({str(saved)!r})\n"
        "except ValueError as error:\n    assert 'trust_remote_code=True' in str(error), error\n"
        f"else:\n    raise SystemExit('{name} loaded')"
        for name in names
    )
    run_without_package(code)


def required_files(folder):
    """The modules that the folder's auto_maps name, and all they import from beside them."""
    maps = [json.loads((folder / "config.json").read_text())["auto_map"]]
    maps.append(json.loads((folder / "processor_config.json").read_text())["auto_map"])
    return {f"{reference.rpartition('.')[0]}.py" for auto_map in maps for reference in auto_map.values()}


def test_a_re_saved_folder_keeps_code_and_auto_map(saved, tmp_path):
    AutoModelForImageTextToText.from_pretrained(saved).save_pretrained(tmp_path)
    AutoProcessor.from_pretrained(saved).save_pretrained(tmp_path)
    assert required_files(tmp_path) <= {path.name for path in tmp_path.iterdir()}
    assert json.loads((tmp_path / "config.json").read_text())["auto_map"] == AUTO_MAP
    assert {path.name for path in tmp_path.glob("*.py")} == {path.name for path in saved.glob("*.py")}


def test_saved_code_is_the_packages_own(saved):
    for path in saved.glob("*.py"):
        if path.name != "__init__.py":
            assert path.read_text() == (Path(modeling_vlmoe.__path__[0]) / path.name).read_text()


def test_a_trainer_checkpoint_loads_anywhere(saved, tmp_path, run_without_package):
    model, proc = AutoModelForImageTextToText.from_pretrained(saved), AutoProcessor.from_pretrained(saved)
    row = torch.load(saved / "expected.pt")["inputs"]
    rows = [{name: value[0] for name, value in row.items()} | {"labels": row["input_ids"][0]}]
    arguments = transformers.TrainingArguments(
        tmp_path / "run", max_steps=1, save_steps=1, remove_unused_columns=False, use_cpu=True, report_to=[]
    )
    transformers.Trainer(model, arguments, train_dataset=rows, processing_class=proc).train()
    checkpoint = tmp_path / "run" / "checkpoint-1"
    assert type(AutoModelForImageTextToText.from_pretrained(checkpoint)) is VLMoEForConditionalGeneration
    torch.save({"inputs": row, "logits": model.eval()(**row).logits.detach()}, tmp_path / "expected.pt")
    run_without_package(
        REMOTE.format(folder=str(checkpoint), expected=str(tmp_path / "expected.pt"), again=str(tmp_path / "again"))
    )


def test_a_merged_adapter_loads_anywhere(saved, tmp_path, run_without_package):
    from peft import LoraConfig, get_peft_model

    model = AutoModelForImageTextToText.from_pretrained(saved)
    peft = get_peft_model(
        model,
        LoraConfig(
            r=2,
            target_modules=r".*language_model.*(q_proj|v_proj)",
            target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
            modules_to_save=["router"],
        ),
    )
    torch.manual_seed(0)
    for name, parameter in peft.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    inputs = torch.load(saved / "expected.pt")["inputs"]
    wanted = peft.eval()(**inputs, output_router_logits=True)
    assert len(wanted.router_logits) == 3
    merged = peft.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    AutoProcessor.from_pretrained(saved).save_pretrained(tmp_path / "merged")
    torch.save({"inputs": inputs, "logits": merged(**inputs).logits.detach()}, tmp_path / "expected.pt")
    assert (merged(**inputs).logits - wanted.logits).abs().max() < 1e-4
    run_without_package(
        REMOTE.format(
            folder=str(tmp_path / "merged"), expected=str(tmp_path / "expected.pt"), again=str(tmp_path / "again")
        )
    )


def test_importing_twice_changes_nothing():
    modeling_vlmoe.register()
    assert modeling_vlmoe.VLMoEModel is VLMoEModel


def test_the_command_does_not_wait_for_torch():
    code = "import sys; sys.argv = ['/usr/bin/vlmoe']; import modeling_vlmoe; assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
