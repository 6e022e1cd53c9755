"""`vlmoe finetune` as a user runs it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from modeling_vlmoe import cli

VLMOE = Path(sys.executable).parent / "vlmoe"


@pytest.fixture
def vlmoe(tmp_path):
    """Runs the command in an empty folder; returns the exit code and what it said."""

    def run(*words):
        done = subprocess.run(
            [VLMOE, "finetune", *words], cwd=tmp_path, capture_output=True, text=True, timeout=300, env=os.environ
        )
        return done.returncode, done.stdout, done.stderr

    return run


def test_command_trains_and_says_where(vlmoe, base, pictures, tmp_path):
    given = [f"model={base}", f"data={pictures / 'test.jsonl'}", "output_dir=out", "max_steps=1", "use_cpu=true"]
    code, said, errors = vlmoe("lora", *given)
    assert code == 0, errors
    assert "it/s" not in said + errors, "a progress bar where nobody watches"
    assert said.strip().splitlines()[-1] == "out: done; settings in finetune_settings.yaml"
    assert (tmp_path / "out" / "adapter_model.safetensors").exists()
    assert any((tmp_path / "out" / "runs").rglob("events.out.tfevents*"))


def test_user_errors_are_one_message_and_exit_2(vlmoe):
    code, said, errors = vlmoe("lora", "model=m", "data=d", "output_dir=o", "lerning_rate=1")
    assert code == 2
    assert errors.strip().splitlines()[-1] == (
        "vlmoe: Recipe lora has unknown keys: lerning_rate. Did you mean 'learning_rate' for 'lerning_rate'?"
    )
    assert "Traceback" not in errors
    assert said == ""


def test_help_names_every_setting(vlmoe):
    code, said, _ = vlmoe("--help")
    assert code == 0
    assert all(name in said for name in ("align", "lora", "lora_targets", "max_length", "KEY=VALUE"))


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (FileNotFoundError(2, "No such file or directory", "x"), 2, "vlmoe: [Errno 2] No such file or directory: 'x'"),
        (PermissionError(13, "Permission denied", "x"), 2, "vlmoe: [Errno 13] Permission denied: 'x'"),
        (OSError("the Hub says no"), 2, "vlmoe: the Hub says no"),
        (OSError(28, "No space left on device"), 1, "vlmoe: No space left on device"),
    ],
)
def test_errors_of_the_system_are_one_message(monkeypatch, capsys, error, code, said):
    def fail():
        raise error

    monkeypatch.setattr(cli, "app", fail)
    monkeypatch.setattr(cli.signal, "signal", lambda *_: None)
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == code
    assert capsys.readouterr().err.strip() == said


def test_errors_that_are_ours_keep_their_traceback(monkeypatch):
    def fail():
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(cli, "app", fail)
    monkeypatch.setattr(cli.signal, "signal", lambda *_: None)
    with pytest.raises(OSError, match="Input/output error"):
        cli.main()
