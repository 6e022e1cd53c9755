"""Every sub-command of `vlmoe`, as a user runs it: help, refusals, verbosity. What each does is tested beside it."""

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from modeling_vlmoe.cli import app
from tests.finetune.questions import question, write_rows

VLMOE = Path(sys.executable).parent / "vlmoe"
COMMANDS = sorted(typer.main.get_command(app).commands)
MAX_SECONDS = 2


def vlmoe(*words, cwd=None, **environment):
    return subprocess.run(
        [VLMOE, *map(str, words)],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=cwd,
        env=os.environ | environment,
    )


def children_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


@pytest.mark.parametrize("command", [[], *([name] for name in COMMANDS)], ids=lambda words: " ".join(words) or "vlmoe")
def test_help_is_fast_and_needs_no_torch(command):
    """Processor time, which other work on the machine does not lengthen."""
    code = (
        "import sys; sys.modules['torch'] = None; sys.argv[0] = 'vlmoe'; from modeling_vlmoe.cli import main; main()"
    )
    before = children_seconds()
    done = subprocess.run([sys.executable, "-c", code, *command, "--help"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "Usage: vlmoe" in done.stdout
    assert all(name in done.stdout for name in command or COMMANDS)
    assert children_seconds() - before < MAX_SECONDS


@pytest.mark.parametrize("command", COMMANDS)
def test_an_unknown_flag_is_refused_by_every_command(command):
    done = vlmoe(command, "--no-such-flag", "x")
    assert done.returncode == 2
    assert "--no-such-flag" in done.stderr
    assert "Traceback" not in done.stderr


def test_an_unknown_command_is_refused():
    done = vlmoe("upcicle")
    assert (done.returncode, done.stdout) == (2, "")
    assert "upcicle" in done.stderr


def refusals(folder):
    """What a user may get wrong, and what has to be named."""
    (folder / "full").mkdir()
    (folder / "full" / "kept.txt").write_text("mine")
    (folder / "broken.yaml").write_text("text_model: [")
    (folder / "model").mkdir()
    (folder / "model" / "config.json").write_text("{")
    write_rows(folder / "rows.jsonl", [question([], "red")])
    return [
        (["upcycle"], "--output-dir"),
        (["upcycle", "--output-dir", "full"], "full"),
        (["upcycle", "--output-dir", "new", "--recipe", "broken.yaml"], "broken.yaml"),
        (["upcycle", "--output-dir", "new", "--text-model", "model", "--vision-model", "model"], "model/config.json"),
        (["upcycle", "--output-dir", "new", "--text-model", "model"], "--vision-model"),
        (["upcycle", "--output-dir", "new", "--format", "gguf"], "gguf"),
        (["export", "--output-dir", "new"], "CHECKPOINT"),
        (["export", "nothing", "--output-dir", "new"], "nothing"),
        (["export", "model", "--output-dir", "new"], "model/config.json"),
        (["export", "model", "--output-dir", "new", "--to", "gguf"], "gguf"),
        (["import", "--output-dir", "new", "--text-model", "model"], "--vision-model"),
        (["import", "--output-dir", "new", "--vlm-model", "model"], "model/config.json"),
        (["convert-routing", "--to", "shared", "--output-dir", "new"], "CHECKPOINT"),
        (["convert-routing", "model", "--to", "pools", "--output-dir", "new"], "pools"),
        (["convert-routing", "model", "--to", "isolated", "--output-dir", "new"], "model/config.json"),
        (["finetune", "nothing.yaml"], "nothing.yaml"),
        (["finetune", "lora"], "model"),
        (["finetune", "lora", "model=model", "data=rows.jsonl", "output_dir=new"], "model"),
        (["finetune", "lora", "model=nobody/nothing", "data=rows.jsonl", "output_dir=new"], "nobody/nothing"),
        (["finetune", "lora", "model=model", "data=rows.jsonl", "output_dir=full"], "full"),
        (["finetune", "moe-llava", "output_dir=new", "data=rows.jsonl"], "text_model"),
        (["finetune", "moe-llava", "model=model", "output_dir=new", "data=rows.jsonl", "aling.lora_r=2"], "'align'"),
        (["finetune", "lora", "model=model", "data=rows.jsonl", "output_dir=new", "--with-dense-control"], "model"),
        (["demo", "--output-dir", "full"], "full"),
        (["data", "check"], "DATA"),
        (["data", "check", "nothing.jsonl"], "nothing.jsonl"),
        (["data", "check", "rows.jsonl", "--format", "coco"], "coco"),
        (["data", "check", "rows.jsonl", "--model", "model"], "model/config.json"),
        (["finetune", "lora", "model=m", "data=rows.jsonl", "output_dir=new", "streaming=true"], "max_steps"),
        (["finetune", "lora", "model=m", "data=rows.jsonl", "output_dir=new", "data_format=coco"], "coco"),
        (["evaluate", "model", "vqa", "--data", "rows.jsonl", "--image-folder", "nothing"], "model/config.json"),
        (["route", "model"], "DATA"),
        (["route", "model", "rows.jsonl", "--output-dir", "full"], "full"),
        (["route", "model", "rows.jsonl", "--output-dir", "new"], "model"),
        (["route", "nobody/nothing", "rows.jsonl", "--output-dir", "new"], "nobody/nothing"),
        (["route", "model", "rows.jsonl", "--batch-size", "0"], "batch_size"),
        (["evaluate", "model"], "give a TASK"),
        (["evaluate", "model", "vqa"], "--data"),
        (["evaluate", "model", "vqa", "--data", "rows.jsonl", "--output-dir", "full"], "full"),
        (["evaluate", "model", "vqa", "--data", "rows.jsonl", "--output-dir", "new"], "model"),
        (["evaluate", "nobody/nothing", "--suite", "llava", "--data-dir", "full"], "nobody/nothing"),
        (["classify"], "--output-dir"),
        (["classify", "--output-dir", "full"], "full"),
        (["classify", "--output-dir", "new", "--data", "nothing"], "nothing"),
        (["classify", "--output-dir", "new", "--test-share", "2"], "--test-share"),
        (["-q", "-v", "demo"], "-v and -q"),
    ]


def test_refusals_name_what_is_wrong_in_one_message(tmp_path, monkeypatch, capsys):
    """Through `main`, in one process for speed: exit code 2, no traceback, nothing written."""
    from modeling_vlmoe import cli

    cases = refusals(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli.signal, "signal", lambda *_: None)
    monkeypatch.setattr(cli, "hide_bars", lambda *_: None)
    for words, named in cases:
        monkeypatch.setattr(sys, "argv", ["vlmoe", *words])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        said = capsys.readouterr()
        assert stopped.value.code == 2, (words, said.err)
        assert said.err.startswith("vlmoe: "), (words, said.err)
        assert named in said.err, (words, said.err)
        assert said.out == ""
    assert sorted(tmp_path.rglob("*")) == before
