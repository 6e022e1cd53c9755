"""A user's first five minutes: tune a model of the Hub with TRL, push the adapter; a stranger pulls and merges it."""

import pytest

TUNE = """
import sys, torch
torch.set_num_threads(1)
import modeling_vlmoe
from datasets import Dataset
from PIL import Image
from trl import SFTConfig, SFTTrainer
from modeling_vlmoe.finetune import follow_trainer, lora_config

def row(colour):
    asked = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "which colour?"}]}
    said = {"role": "assistant", "content": [{"type": "text", "text": colour}]}
    return {"messages": [asked, said], "images": [Image.new("RGB", (24, 24), colour)]}

config = lora_config("alice/tiny", lora_r=4, train_connector=True)
args = SFTConfig(
    "tuned", max_steps=60, learning_rate=1e-2, max_length=None, assistant_only_loss=True, logging_steps=1,
    save_strategy="no", use_cpu=True, bf16=False, report_to="none", hub_model_id="alice/colours",
)
trainer = SFTTrainer("alice/tiny", args=args, peft_config=config,
                     train_dataset=Dataset.from_list([row(colour) for colour in ("red", "green", "blue", "white")]))
follow_trainer(trainer)
trainer.train()
losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
assert losses[-1] < 0.5 * losses[0], losses
trainer.push_to_hub()
inputs = trainer.data_collator([row("red"), row("blue")])
inputs.pop("labels")
with torch.no_grad():
    torch.save({"inputs": dict(inputs), "logits": trainer.model.eval()(**inputs).logits}, sys.argv[1])
"""
PULL = """
import sys, torch
torch.set_num_threads(1)
from peft import PeftModel
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor
base = AutoModelForImageTextToText.from_pretrained("alice/tiny", trust_remote_code=True)
model = PeftModel.from_pretrained(base, "alice/colours").merge_and_unload(safe_merge=True).eval()
expected = torch.load(sys.argv[1])
with torch.no_grad():
    found = model(**expected["inputs"]).logits
torch.testing.assert_close(found, expected["logits"], atol=1e-4, rtol=0)
processor = AutoProcessor.from_pretrained("alice/colours", trust_remote_code=True)
image = {"type": "image", "image": Image.new("RGB", (24, 24), "red")}
chat = [{"role": "user", "content": [image, {"type": "text", "text": "which colour?"}]}]
asked = dict(add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt")
inputs = processor.apply_chat_template(chat, **asked)
output = model.generate(**inputs, max_new_tokens=4)
print(type(model).__module__, processor.decode(output[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True))
"""


@pytest.mark.slow
def test_tune_with_trl_push_pull_merge_and_generate(hub, converted, run_python, tmp_path):
    """Tuned where the package is, by the model's name; pulled where it is not."""
    hub.write("alice/tiny", {path.name: path.read_bytes() for path in converted.iterdir() if path.is_file()})
    run_python(TUNE, hub.env(), home="tuner", arguments=[tmp_path / "expected.pt"])
    pushed = hub.files("alice/colours")
    assert {"adapter_model.safetensors", "adapter_config.json", "processor_config.json"} <= set(pushed)
    assert "model.safetensors" not in pushed
    said = run_python(
        PULL, hub.env(None), home="puller", without_package=True, arguments=[tmp_path / "expected.pt"]
    ).split()
    assert said[0].startswith("transformers_modules.")
    assert said[1:] == ["red"]
