"""What a run leaves is loaded again exactly: in another process, without the package, and merged."""

import shutil
import subprocess
import sys

import pytest
import torch
from peft import AutoPeftModel, PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForImageTextToText, AutoProcessor

from modeling_vlmoe.finetune import ChatCollator, finetune, load_chat_data, load_finetuned, merge_adapter
from modeling_vlmoe.finetune.checkpoints import load_base

SCRIPT = """
import sys, torch
from safetensors.torch import load_file, save_file
torch.set_num_threads(1)
kind, folder, inputs, out = sys.argv[1:]
if kind == "ours":
    from modeling_vlmoe.finetune import load_finetuned
    model, _ = load_finetuned(folder)
elif kind == "auto":
    import modeling_vlmoe
    from transformers import AutoModelForImageTextToText
    model = AutoModelForImageTextToText.from_pretrained(folder)
else:
    sys.modules["modeling_vlmoe"] = None
    from transformers import AutoModelForImageTextToText, AutoProcessor
    model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True)
    assert type(AutoProcessor.from_pretrained(folder, trust_remote_code=True)).__name__ == "VLMoEProcessor"
with torch.no_grad():
    save_file({"logits": model.eval()(**load_file(inputs)).logits.contiguous()}, out)
"""


@pytest.fixture(scope="module")
def inputs(processor, pictures, tmp_path_factory):
    batch = ChatCollator(processor)(list(load_chat_data(pictures, "train")))
    batch.pop("labels")
    path = tmp_path_factory.mktemp("inputs") / "inputs.safetensors"
    save_file(batch, path)
    return path


@pytest.fixture
def adapter(arguments):
    return finetune(arguments(train_connector=True, lora_parts=["text", "vision"], merge=True))


@torch.no_grad()
def logits_of(model, inputs):
    return model.eval()(**load_file(inputs)).logits


def logits_elsewhere(kind, folder, inputs, out):
    """The logits that a fresh process computes."""
    command = [sys.executable, "-c", SCRIPT, kind, str(folder), str(inputs), str(out / "logits.safetensors")]
    done = subprocess.run(command, cwd=out, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return load_file(out / "logits.safetensors")["logits"]


def assert_equal(found, wanted, atol=0.0):
    torch.testing.assert_close(found, wanted, rtol=0, atol=atol)


def test_adapter_is_reloaded_exactly(adapter, base, inputs, tmp_path):
    model, processor = load_finetuned(adapter)
    assert isinstance(model, PeftModel)
    assert type(processor).__name__ == "VLMoEProcessor"
    wanted = logits_of(model, inputs)
    assert (wanted - logits_of(AutoModelForImageTextToText.from_pretrained(base), inputs)).abs().max() > 1e-2
    assert_equal(logits_elsewhere("ours", adapter, inputs, tmp_path), wanted)
    assert_equal(logits_elsewhere("auto", adapter, inputs, tmp_path), wanted)
    assert_equal(logits_of(AutoModelForImageTextToText.from_pretrained(adapter / "checkpoint-2"), inputs), wanted)
    automatic = AutoPeftModel.from_pretrained(adapter, import_allowlist=["modeling_vlmoe"])
    assert_equal(logits_of(automatic, inputs), wanted)


def test_the_saved_adapter_is_the_trained_one(model, processor, pictures, arguments, inputs, tmp_path):
    from modeling_vlmoe.finetune import build_trainer, save_finetuned

    args = arguments(train_connector=True)
    trainer = build_trainer(model, processor, load_chat_data(pictures, "test"), args)
    trainer.train()
    wanted = logits_of(trainer.model, inputs)
    loaded, _ = load_finetuned(save_finetuned(trainer.model, processor, tmp_path / "saved", args))
    assert_equal(logits_of(loaded, inputs), wanted)


def test_merged_model_equals_the_adapter_and_needs_no_package(adapter, inputs, tmp_path):
    merged = adapter / "merged"
    wanted = logits_of(load_finetuned(adapter)[0], inputs)
    again = merge_adapter(adapter, tmp_path / "again")
    for folder in (merged, again):
        model, loading = AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True)
        assert not any(loading.values())
        assert_equal(logits_of(model, inputs), wanted, atol=1e-5)
        assert (folder / "upcycle_receipt.json").read_text() == '{"seed": 0}'
        assert AutoProcessor.from_pretrained(folder).image_token_id == model.config.image_token_id
    assert_equal(logits_elsewhere("remote", merged, inputs, tmp_path), wanted, atol=1e-5)
    assert type(AutoModel.from_pretrained(merged)).__name__ == "VLMoEModel"


def test_adapter_whose_model_has_moved_is_loaded_with_base_model(adapter, base, inputs, tmp_path):
    wanted = logits_of(load_finetuned(adapter)[0], inputs)
    config = adapter / "adapter_config.json"
    config.write_text(config.read_text().replace(str(base), "/moved/away"))
    with pytest.raises(ValueError, match="belongs to the model /moved/away, which is not there; give base_model"):
        load_finetuned(adapter)
    assert_equal(logits_of(load_finetuned(adapter, base_model=str(base))[0], inputs), wanted)


def test_aligned_checkpoint_loads_anywhere(arguments, inputs, tmp_path):
    folder = finetune(arguments(method="align"))
    wanted = logits_of(load_finetuned(folder)[0], inputs)
    assert_equal(logits_elsewhere("remote", folder, inputs, tmp_path), wanted)
    assert_equal(logits_elsewhere("remote", folder / "checkpoint-2", inputs, tmp_path), wanted)


def test_a_loaded_adapter_can_be_trained_on(adapter):
    model, _ = load_finetuned(adapter, is_trainable=True)
    assert any(parameter.requires_grad for parameter in model.parameters())
    assert not any(parameter.requires_grad for parameter in load_finetuned(adapter)[0].parameters())


def test_raises_when_there_is_nothing_to_merge(adapter, base, tmp_path):
    with pytest.raises(ValueError, match="is not an empty folder"):
        merge_adapter(adapter, base)
    with pytest.raises(ValueError, match="holds no adapter"):
        merge_adapter(base, tmp_path / "new")


def test_raises_when_an_adapter_is_given_as_the_model(adapter, arguments, tmp_path):
    shutil.rmtree(adapter / "merged")
    with pytest.raises(
        ValueError, match=r"has no config.json; expected a model.s folder. It holds an adapter: merge it first"
    ):
        finetune(arguments(model=str(adapter), output_dir=str(tmp_path / "next")))


def test_raises_when_the_weights_are_truncated(base, tmp_path):
    broken = shutil.copytree(base, tmp_path / "broken")
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ValueError, match="cannot be read; expected safetensors"):
        load_base(str(broken))
