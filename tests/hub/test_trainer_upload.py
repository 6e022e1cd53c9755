"""A Trainer's own upload (`push_to_hub=True`) is a repository that others can load, and that tells whose it is."""

import json

import pytest
from huggingface_hub import ModelCard

from tests.hub_server import metadata_errors

# Two steps by the host's Trainer; each checkpoint is uploaded as it is written. Then the logits of what was uploaded.
TRAIN = """
import sys, torch
torch.set_num_threads(1)
import modeling_vlmoe
from transformers import AutoModelForImageTextToText, AutoProcessor, Trainer, TrainingArguments
from modeling_vlmoe.finetune import ChatCollator, WholeUploads, load_chat_data

started, rows, out = sys.argv[1:4]
model, processor = (kind.from_pretrained(started) for kind in (AutoModelForImageTextToText, AutoProcessor))
args = TrainingArguments("tuned", max_steps=2, save_steps=1, learning_rate=1e-2, per_device_train_batch_size=2,
                         use_cpu=True, report_to="none", remove_unused_columns=False, push_to_hub=True,
                         hub_model_id="alice/tuned", hub_always_push=True)
trainer = Trainer(model, args, data_collator=ChatCollator(processor), train_dataset=load_chat_data(rows),
                  processing_class=processor, callbacks=CALLBACKS)
trainer.train()
content = [{"type": "image"}, {"type": "text", "text": "what?"}]
from PIL import Image
text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
inputs = dict(processor(text=text, images=Image.new("RGB", (20, 20), "red"), return_tensors="pt"))
with torch.no_grad():
    torch.save({"inputs": inputs, "logits": model.eval()(**inputs).logits}, out)
"""
# The documented line, where the package is not; the logits are those of the training process but for the last bits.
PULL = """
import sys, torch
from transformers import AutoModelForImageTextToText, AutoProcessor
torch.set_num_threads(1)
model = AutoModelForImageTextToText.from_pretrained("alice/tuned", trust_remote_code=True)
processor = AutoProcessor.from_pretrained("alice/tuned", trust_remote_code=True)
assert type(processor).__name__ == "VLMoEProcessor", type(processor)
found = torch.load(sys.argv[1])
with torch.no_grad():
    torch.testing.assert_close(model.eval()(**found["inputs"]).logits, found["logits"], rtol=0, atol=1e-5)
print(type(model).__module__)
"""


@pytest.mark.parametrize(
    "callbacks", ["[WholeUploads()]", pytest.param("None", marks=pytest.mark.slow)], ids=["whole", "plain"]
)
def test_what_a_trainer_uploads_is_pulled_by_a_stranger(hub, made, rows, run_python, tmp_path, callbacks):
    expected = tmp_path / "expected.pt"
    code = TRAIN.replace("CALLBACKS", callbacks)
    run_python(code, hub.env(), home="tuner", arguments=[made, rows, expected])
    said = run_python(PULL, hub.env(None), without_package=True, home="puller", arguments=[expected])
    assert said.startswith("transformers_modules")
    files = hub.files("alice/tuned")
    assert {"config.json", "model.safetensors", "modeling_vlmoe.py", "processing_vlmoe.py"} <= set(files)
    if callbacks == "None":
        return
    assert json.loads(files["upcycle_receipt.json"]) == json.loads((made / "upcycle_receipt.json").read_text())
    text = files["README.md"].decode()
    assert "The weights are not those that the upcycling wrote" in text
    assert "upcycle_receipt.json" in text
    assert metadata_errors(text) == []
    assert ModelCard(text).data.license == "other"
