"""Code that processes of their own run on what has been pushed."""

# Loads by id, at each of the given revisions, and compares with the logits of the folder that was pushed. No import of
# the package: it may be absent.
LOAD = """
import json, sys, torch
from PIL import Image
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoProcessor
torch.set_num_threads(1)
name, expected, revisions = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
found = torch.load(expected)
for revision in revisions:
    kwargs = {"trust_remote_code": True, "revision": revision}
    model = AutoModelForImageTextToText.from_pretrained(name, **kwargs)
    processor = AutoProcessor.from_pretrained(name, **kwargs)
    assert type(processor).__name__ == "VLMoEProcessor", type(processor)
    config_class = sys.modules[type(model).__module__].VLMoEConfig
    assert type(model.config) is config_class, (type(model.config), config_class)
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(**found["inputs"]).logits, found["logits"], rtol=0, atol=0)
content = [{"type": "image", "image": Image.new("RGB", (20, 20))}, {"type": "text", "text": "what?"}]
asked = dict(add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt")
inputs = processor.apply_chat_template([{"role": "user", "content": content}], **asked)
model.generate(**inputs, max_new_tokens=2)
print(type(model).__module__)
"""
# The same, then saved again and told what companions the folder has.
LOAD_AND_SAVE = (
    LOAD
    + """
model.save_pretrained("again", max_shard_size="100KB"); processor.save_pretrained("again")
"""
)
LOAD_PROCESSOR = """
processor = AutoProcessor.from_pretrained("alice/processor", trust_remote_code=True)
assert type(processor).__name__ == "VLMoEProcessor"
"""
# What the environment's token opens is closed to each of the others.
REFUSED = """
for number, token in enumerate(sys.argv[4:]):
    try:
        AutoModelForImageTextToText.from_pretrained(name, token=token or False, cache_dir=f"cache-{number}", **kwargs)
    except OSError:
        continue
    raise SystemExit(f"not refused: {token}")
"""
PUSH_FROM_PYTHON = """
import sys, modeling_vlmoe
from huggingface_hub import ModelCard
from transformers import AutoModelForImageTextToText, AutoProcessor
model, processor = (kind.from_pretrained(sys.argv[1]) for kind in (AutoModelForImageTextToText, AutoProcessor))
model.push_to_hub("alice/python", max_shard_size="100KB", tags=["mine"])
processor.push_to_hub("alice/python")
processor.push_to_hub("alice/processor")
model.save_pretrained("saved", push_to_hub=True, repo_id="alice/saved")
ModelCard.load(f"{sys.argv[1]}/README.md").push_to_hub("alice/python")
"""
PUSH_ADAPTER_FROM_PYTHON = """
import sys, torch, modeling_vlmoe
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForImageTextToText, AutoProcessor
model = AutoModelForImageTextToText.from_pretrained("alice/tiny")
parameters = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
config = LoraConfig(r=2, target_modules=r".*language_model.*(q_proj|v_proj)", target_parameters=parameters)
peft = get_peft_model(model, config)
torch.manual_seed(0)
for name, parameter in peft.named_parameters():
    if "lora_B" in name:
        torch.nn.init.normal_(parameter, std=0.1)
peft.push_to_hub("alice/peft")
AutoProcessor.from_pretrained("alice/tiny").push_to_hub("alice/peft")
with torch.no_grad():
    found = torch.load(sys.argv[1])
    found["logits"] = peft.eval()(**found["inputs"]).logits
    torch.save(found, sys.argv[2])
"""
