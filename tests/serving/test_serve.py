"""A server answers a chat with an image, and says what `generate` says: vlmoe itself, and as native LLaVA."""

import base64
import io
import json
import subprocess
import sys
from pathlib import Path

import requests
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from tests.serving.conftest import HOST, VLMOE, running

NUM_TOKENS = 8


def data_url(colour: str) -> str:
    file = io.BytesIO()
    Image.new("RGB", (24, 24), colour).save(file, "PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def question(colour: str) -> list[dict]:
    image = {"type": "image_url", "image_url": {"url": data_url(colour)}}
    return [{"role": "user", "content": [image, {"type": "text", "text": "what colour is the shape?"}]}]


def ask(url: str, model, colour: str, **fields) -> requests.Response:
    body = {"model": str(model), "messages": question(colour), "max_tokens": NUM_TOKENS, "temperature": 0.0} | fields
    reply = requests.post(f"{url}/v1/chat/completions", json=body, timeout=120)
    assert reply.ok, reply.text
    return reply


def answer(url: str, model, colour: str) -> str:
    return ask(url, model, colour).json()["choices"][0]["message"]["content"]


def generated(folder, colour: str) -> str:
    """The answer of the model in this process."""
    processor = AutoProcessor.from_pretrained(folder)
    content = [{"type": "image", "url": data_url(colour)}, {"type": "text", "text": "what colour is the shape?"}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    model = AutoModelForImageTextToText.from_pretrained(folder)
    output = model.generate(**inputs, max_new_tokens=NUM_TOKENS, do_sample=False)
    return processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def test_vlmoe_serve_answers_a_chat_with_an_image(vlmoe_server, vlmoe_folder):
    red, blue = answer(vlmoe_server, vlmoe_folder, "red"), answer(vlmoe_server, vlmoe_folder, "blue")
    assert (red, blue) == (generated(vlmoe_folder, "red"), generated(vlmoe_folder, "blue"))
    assert red != blue


def test_vlmoe_serve_streams(vlmoe_server, vlmoe_folder):
    lines = ask(vlmoe_server, vlmoe_folder, "red", stream=True).text.splitlines()
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: {")]
    pieces = [chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks]
    assert sum(map(bool, pieces)) > 1
    assert "".join(pieces) == answer(vlmoe_server, vlmoe_folder, "red")


def test_transformers_serve_answers_for_the_native_checkpoint_without_this_package(native_folder, vlmoe_folder):
    with running(HOST, native_folder) as url:
        for colour in ("red", "blue"):
            assert answer(url, native_folder, colour) == generated(vlmoe_folder, colour)


def test_the_native_model_computes_what_vlmoe_computes(native_folder, vlmoe_folder):
    from tests.models import batch, gap

    ours = AutoModelForImageTextToText.from_pretrained(vlmoe_folder)
    theirs = AutoModelForImageTextToText.from_pretrained(native_folder)
    assert type(theirs).__name__ == "LlavaForConditionalGeneration"
    inputs = batch((1, 2))
    inputs["input_ids"][inputs["input_ids"] == 300] = ours.config.image_token_id
    with torch.no_grad():
        found = ours(**inputs).logits
    assert gap(found, theirs(**inputs).logits) <= 1e-5


def test_quantization_of_the_server_reaches_experts(vlmoe_folder, monkeypatch):
    """Through the host's own manager, as its command line fills it."""
    from transformers.cli.serving.model_manager import ModelManager

    from modeling_vlmoe.quantization import expert_bytes
    from modeling_vlmoe.serve_command import pack_experts_too
    from modeling_vlmoe.servers import register_with_servers

    monkeypatch.setattr(ModelManager, "get_quantization_config", ModelManager.get_quantization_config)
    register_with_servers()
    pack_experts_too(ModelManager)
    sizes = {}
    for quantization in (None, "bnb-8bit", "bnb-4bit"):
        manager = ModelManager(device="cpu", quantization=quantization)
        model, _ = manager.load_model_and_processor(f"{vlmoe_folder}@main")
        sizes[quantization] = sum(expert_bytes(model).values())
        manager.shutdown()
    assert sizes["bnb-4bit"] < 0.6 * sizes["bnb-8bit"] < 0.3 * sizes[None]


def test_raises_when_the_server_is_not_installed():
    code = (
        "import sys; sys.argv = ['vlmoe', 'serve', 'x']; sys.modules['fastapi'] = None\n"
        "import transformers.utils.import_utils as host; host.is_fastapi_available = lambda: False\n"
        "from modeling_vlmoe.cli import main; main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert "pip install 'vlmoe[serve]'" in done.stderr


def test_an_option_that_the_host_does_not_know_is_refused():
    done = subprocess.run([*VLMOE, "x", "--no-such-flag"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert "--no-such-flag" in done.stderr
    assert Path(VLMOE[0]).name == "vlmoe"
