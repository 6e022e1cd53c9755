"""From parents to answers with no network: `HF_HUB_OFFLINE=1`, everything from the Hub's local cache."""

import shutil
import socket
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants, is_offline_mode
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, pipeline

from modeling_vlmoe import cli
from tests import tiny
from tests.finetune.questions import question, write_rows

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def cache(repo_id: str, folder: Path) -> None:
    """Puts a folder where a download would have."""
    home = Path(constants.HF_HUB_CACHE) / f"models--{repo_id.replace('/', '--')}"
    shutil.copytree(folder, home / "snapshots" / COMMIT)
    (home / "refs").mkdir()
    (home / "refs" / "main").write_text(COMMIT)


@pytest.fixture
def no_network(monkeypatch):
    def refuse(self, address, *args):
        raise AssertionError(f"a connection to {address}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket.socket, "connect_ex", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *address, **_: refuse(None, address))


def test_upcycling_tuning_and_answering_need_no_network(tmp_path, monkeypatch, no_network):
    assert is_offline_mode()
    cache("offline/llm", tiny.save_text_parent(tmp_path / "llm", "llama"))
    cache("offline/vit", tiny.save_vision_parent(tmp_path / "vit", "siglip"))
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (24, 24), "red").save("red.png")
    write_rows(tmp_path / "rows.jsonl", [question(["red.png"], "red")] * 2)
    monkeypatch.setattr(cli.signal, "signal", lambda *_: None)
    monkeypatch.setattr(cli, "hide_bars", lambda *_: None)

    def vlmoe(line: str) -> None:
        monkeypatch.setattr(sys, "argv", ["vlmoe", *line.split()])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        assert stopped.value.code in (0, None)

    vlmoe("upcycle --text-model offline/llm --vision-model offline/vit --output-dir model --text-experts 4")
    cache("offline/vlm", tmp_path / "model")
    vlmoe(
        "finetune lora model=offline/vlm data=rows.jsonl output_dir=tuned merge=true max_steps=1 use_cpu=true "
        "report_to=none"
    )
    for source in ("offline/vlm", "tuned/merged"):
        chat = [
            {"role": "user", "content": [{"type": "image", "image": "red.png"}, {"type": "text", "text": "Which?"}]}
        ]
        inputs = AutoProcessor.from_pretrained(source).apply_chat_template(
            chat, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
        model = AutoModelForImageTextToText.from_pretrained(source)
        output = model.generate(**inputs, max_new_tokens=3, do_sample=False, pad_token_id=0)
        answers = pipeline("image-text-to-text", model=source)
        found = answers(text=chat, max_new_tokens=3, do_sample=False, return_tensors=True)[0]["generated_token_ids"]
        torch.testing.assert_close(torch.as_tensor(found), output[0])
