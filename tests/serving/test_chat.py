"""`vlmoe chat`, as it is typed: with a server, and with a checkpoint; both say what the model generates."""

import json
import os
import pty
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
from PIL import Image

from modeling_vlmoe.chat import Chat, image_url, read_settings
from modeling_vlmoe.chat_answers import from_checkpoint, from_server, request_settings
from modeling_vlmoe.chat_command import run_chat
from tests import tiny
from tests.serving.conftest import free_port
from tests.serving.test_serve import NUM_TOKENS, generated

VLMOE = [str(Path(sys.executable).parent / "vlmoe"), "chat"]
SETTINGS = [f"max_new_tokens={NUM_TOKENS}", "do_sample=false"]
QUESTION = "what colour is the shape?\n"


@pytest.fixture
def pictures(tmp_path, monkeypatch):
    for colour in ("red", "blue"):
        Image.new("RGB", (24, 24), colour).save(tmp_path / f"a {colour} one.png")
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def chat(vlmoe_here):
    return partial(vlmoe_here, "chat")


def test_a_server_and_a_checkpoint_give_the_answers_of_generate(chat, vlmoe_server, vlmoe_folder, pictures):
    typed = f'!image "a red one.png"\n{QUESTION}!clear\n!image "a blue one.png"\n{QUESTION}'
    wanted = f"{generated(vlmoe_folder, 'red')}\n{generated(vlmoe_folder, 'blue')}\n"
    for where in ([f"{vlmoe_server}/v1"], [vlmoe_server], []):
        done = chat(vlmoe_folder, *where, *SETTINGS, typed=typed)
        assert (done.returncode, done.stdout) == (0, wanted), done.stderr


def test_the_conversation_goes_on(chat, vlmoe_server, vlmoe_folder, pictures):
    """The second question sees the first picture and answer."""
    typed = f"{QUESTION}and where is it?\n!save said.json\n"
    done = chat(vlmoe_folder, vlmoe_server, *SETTINGS, "--image", "a red one.png", typed=typed)
    assert done.returncode == 0, done.stderr
    said = json.loads(Path("said.json").read_text())
    assert [message["role"] for message in said] == ["user", "assistant"] * 2
    assert [part["type"] for part in said[0]["content"]] == ["image_url", "text"]
    assert [message["content"] for message in said[1::2]] == done.stdout.splitlines()
    alone = chat(vlmoe_folder, *SETTINGS, "--image", "a red one.png", typed=typed.replace("said", "again"))
    assert alone.stdout == done.stdout


def test_a_terminal_is_prompted_helped_and_corrected(vlmoe_server, vlmoe_folder, pictures):
    user, terminal = pty.openpty()
    process = subprocess.Popen(
        [*VLMOE, str(vlmoe_folder), vlmoe_server, *SETTINGS], stdin=terminal, stdout=terminal, stderr=terminal
    )
    os.close(terminal)
    os.write(user, f'!image nowhere.png\n!image "a red one.png"\n{QUESTION}!exit\n'.encode())
    seen = b""
    while True:
        try:
            seen += os.read(user, 4096)
        except OSError:  # the terminal is closed
            break
    assert process.wait(timeout=60) == 0
    text = seen.decode()
    assert "!image PATH" in text
    assert "there is no such file" in text
    assert generated(vlmoe_folder, "red") in text


def test_raises_when_a_piped_line_cannot_be_done(chat, vlmoe_folder):
    done = chat(vlmoe_folder, f"http://127.0.0.1:{free_port()}", typed=f"{QUESTION}!help\n")
    assert (done.returncode, done.stdout) == (2, "")
    assert "vlmoe serve" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("!iamge x.png", "!iamge is unknown"),
        ("!image x.png", "there is no such file"),
        ("!image 'x.png", "Set quotes in pairs"),
        ("!set max_new_tokens", "max_new_tokens=100"),
        ("!save", "one file name"),
    ],
)
def test_raises_when_a_command_cannot_be_done(line, message):
    with pytest.raises(ValueError, match=message):
        Chat(lambda messages, settings: iter(()), say=print).handle(line)


def test_raises_when_a_file_only_looks_like_an_image(tmp_path):
    (tmp_path / "bad.png").write_text("nope")
    with pytest.raises(ValueError, match=r"Cannot attach .*bad.png: nothing can read it"):
        Chat(lambda messages, settings: iter(()), say=print).attach([str(tmp_path / "bad.png")])


def test_raises_when_there_is_no_such_model_or_it_takes_no_images(tmp_path):
    with pytest.raises(ValueError, match="There is no model nobody/nothing"):
        from_checkpoint("nobody/nothing")
    tiny.text_config("llama").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is a llama model, which takes no images"):
        from_checkpoint(str(tmp_path))


def test_raises_when_a_setting_is_unknown():
    with pytest.raises(ValueError, match="`generate` cannot use max_new_tokens=abc"):
        read_settings(["max_new_tokens=abc"])
    with pytest.raises(ValueError, match="no settings no_such_setting"):
        read_settings(["max_new_tokens=3", "no_such_setting=1"])


@pytest.mark.parametrize("where", ["server", "checkpoint"])
def test_a_seed_repeats_an_answer(where, vlmoe_server, vlmoe_folder):
    answer = from_server(str(vlmoe_folder), vlmoe_server) if where == "server" else from_checkpoint(str(vlmoe_folder))
    messages = [{"role": "user", "content": "what?"}]
    settings = {"max_new_tokens": 12, "do_sample": True, "temperature": 5.0}
    first, again, other = ("".join(answer(messages, settings | {"seed": seed})) for seed in (1, 1, 2))
    assert first == again != other


@pytest.mark.parametrize("where", ["server", "checkpoint"])
def test_raises_when_the_model_cannot_do_it(where, vlmoe_server, vlmoe_folder):
    answer = from_server(str(vlmoe_folder), vlmoe_server) if where == "server" else from_checkpoint(str(vlmoe_folder))
    with pytest.raises(ValueError, match=r"Try other settings|refuses"):
        list(answer([{"role": "user", "content": "what?"}], {"max_new_tokens": 3, "num_beams": 2, "top_k": 3}))


def test_raises_when_the_server_does_not_know_the_model(vlmoe_server):
    with pytest.raises(ValueError, match="another/model"):
        list(from_server("another/model", vlmoe_server)([{"role": "user", "content": "what?"}], {}))


def test_raises_when_two_servers_are_given():
    with pytest.raises(ValueError, match="Two servers"):
        run_chat("model", ["http://a:1", "http://b:2"])


def test_settings_take_the_names_of_the_api():
    assert request_settings({"max_new_tokens": 5, "do_sample": False}) == {"max_tokens": 5, "temperature": 0.0}
    sent = request_settings({"max_new_tokens": 5, "top_k": 3})
    assert json.loads(sent["generation_config"]) == {"max_new_tokens": 5, "top_k": 3}


def test_a_failed_message_is_not_remembered(pictures):
    def fail(messages, settings):
        raise ValueError("no")
        yield ""

    said = []
    session = Chat(fail, say=said.append)
    session.handle("!image 'a red one.png'")
    with pytest.raises(ValueError, match="no"):
        session.handle("what?")
    assert (session.messages, len(session.images)) == ([], 1)


def test_a_stopped_answer_keeps_what_was_said():
    def stop(messages, settings):
        yield "be"
        raise KeyboardInterrupt

    said = []
    session = Chat(stop, say=said.append)
    session.handle("what?")
    assert session.messages[-1] == {"role": "assistant", "content": "be"}


@pytest.mark.parametrize("source", ["https://example.org/a.png", "data:image/png;base64,AAAA"])
def test_addresses_are_handed_on(source):
    assert image_url(source) == source


def test_raises_when_a_file_is_no_image(tmp_path):
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(ValueError, match="no image by its name"):
        image_url(str(tmp_path / "notes.txt"))
