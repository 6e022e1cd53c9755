"""The README's blocks run, from the first to the last, in one folder: what one writes the next one reads.

Nothing in a block is changed but the names in `SUBSTITUTIONS`, and what `EXTRA` adds so that a run takes seconds. A
block that needs more (another id, another file, another language) fails, and says which table here to extend.
"""

import json
import os
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from PIL import Image

from modeling_vlmoe import cli
from modeling_vlmoe.finetune.data import load_chat_data
from tests import hosts, tiny
from tests.finetune.host_rows import template
from tests.finetune.questions import question, write_rows

README = Path(__file__).parents[1] / "README.md"
# Ids on the Hub, and what stands for them here: a tiny parent, or a repository of the Hub that runs on this machine.
SUBSTITUTIONS = {
    "Qwen/Qwen2.5-VL-3B-Instruct": "parents/qwen2_5_vl",
    "Qwen/Qwen3-0.6B": "parents/qwen3",
    "google/siglip-base-patch16-224": "parents/siglip",
    "you/": "alice/",  # a user of the Hub that runs on this machine
}
# What a user brings along; `pictures` are also what the README's own rows name.
ROWS = ("captions.jsonl", "questions.jsonl")
PICTURES = ("scene.png", "images/0001.png")
# Words added to a command.
EXTRA = {"finetune": ["max_steps=1", "use_cpu=true", "report_to=none"]}
# Lines of a shell block that set up the machine; what `make` runs is the whole of these tests and the demo's own.
SET_UP = ("make", "pip", "git", "cd", "python")
# Commands that talk to the Hub, whose address is read when they start.
ON_THE_HUB = ("push",)
SHOWN = ("", "text")  # outputs, pictures in letters


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, its text, and the line it begins at."""

    language: str
    text: str
    line: int


def find_blocks(text: str) -> list[Block]:
    fences = re.finditer(r"^```(\w*)[^\n]*\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [Block(match[1], match[2], text.count("\n", 0, match.start()) + 2) for match in fences]


def substitute(text: str) -> str:
    for given, here in SUBSTITUTIONS.items():
        text = text.replace(given, here)
    return text


def shell_lines(text: str) -> list[list[str]]:
    """The words of each command; a backslash joins lines, comments are left out."""
    joined = text.replace("\\\n", " ").splitlines()
    return [words for line in joined if (words := shlex.split(line, comments=True))]


def run_vlmoe(words: list[str], monkeypatch, hub) -> None:
    """One command, in this process; one that talks to the Hub in its own."""
    name = next((word for word in words if not word.startswith("-")), "")
    words = [*words, *EXTRA.get(name, [])]
    if name in ON_THE_HUB:
        vlmoe = [str(Path(sys.executable).parent / "vlmoe"), *words]
        done = subprocess.run(vlmoe, capture_output=True, text=True, timeout=300, env=os.environ | hub.env())
        assert done.returncode == 0, done.stderr[-2000:]
        return
    monkeypatch.setattr(sys, "argv", ["vlmoe", *words])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code in (0, None), f"exit code {stopped.value.code}"


def run_shell(text: str, monkeypatch, hub) -> None:
    for words in shell_lines(text):
        if words[0] == "vlmoe":
            run_vlmoe(words[1:], monkeypatch, hub)
        else:
            assert words[0] in SET_UP, f"nothing here runs {words[0]!r}: extend SET_UP, or run it"


def run_python(text: str, monkeypatch, hub) -> None:
    exec(compile(text, str(README), "exec"), {"__name__": "__main__"})


def read_json(text: str, monkeypatch, hub) -> None:
    """A row of data is one that fine-tuning reads; anything else is JSON."""
    value = json.loads(text)
    if "messages" in value:
        Path("shown.jsonl").write_text(json.dumps(value))
        assert len(load_chat_data("shown.jsonl")) == 1


RUNNERS = {"bash": run_shell, "sh": run_shell, "python": run_python, "json": read_json}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Where the README's reader stands: dense parents, rows and pictures beside each other."""
    whole = hosts.save(tmp_path / "parents" / "qwen2_5_vl", "qwen2_5_vl")
    (whole / "chat_template.jinja").write_text(template("qwen2_5_vl"))
    tiny.save_text_parent(tmp_path / "parents" / "qwen3", "qwen3")
    tiny.save_vision_parent(tmp_path / "parents" / "siglip", "siglip")
    for name in PICTURES:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (24, 24), "red").save(tmp_path / name)
    for name in ROWS:
        write_rows(tmp_path / name, [question([PICTURES[1]], "red")] * 2)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli.signal, "signal", lambda *_: None)
    monkeypatch.setattr(cli, "hide_bars", lambda *_: None)
    return tmp_path


def test_every_block_of_the_readme_runs(folder, monkeypatch, hub, capsys):
    blocks = find_blocks(README.read_text(encoding="utf-8"))
    assert {"bash", "python", "json"} <= {block.language for block in blocks}
    for block in blocks:
        if block.language in SHOWN:
            continue
        where = f"README.md, the {block.language} block at line {block.line}"
        assert block.language in RUNNERS, f"{where}: no runner for this language; add one to RUNNERS"
        try:
            RUNNERS[block.language](substitute(block.text), monkeypatch, hub)
        except (Exception, pytest.fail.Exception) as error:
            said = capsys.readouterr().err[-500:]
            pytest.fail(
                f"{where} does not run: {type(error).__name__}: {error} {said}\n"
                "If it is right, and names an id, a file or a command that is new, add that to the tables of "
                "tests/test_readme.py."
            )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("```rust\nfn main() {}\n```\n", "no runner for this language"),
        ("```bash\ncurl https://example.com\n```\n", "nothing here runs 'curl'"),
        ("```bash\nvlmoe upcycle --text-model someone/new --vision-model b --output-dir c\n```\n", "someone/new"),
        ("```python\nraise KeyError('new')\n```\n", "KeyError"),
    ],
)
def test_a_block_that_is_new_is_found(text, message, folder, monkeypatch, hub, capsys):
    readme = folder / "README.md"
    readme.write_text("```json\n{}\n```\n```bash\n```\n```python\n```\n" + text)
    monkeypatch.setattr(sys.modules[__name__], "README", readme)
    with pytest.raises((AssertionError, pytest.fail.Exception), match=f"(?s)block at line 9.*{message}"):
        test_every_block_of_the_readme_runs(folder, monkeypatch, hub, capsys)
