"""`vlmoe upcycle` as a user runs it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

VLMOE = [sys.executable, "-c", "import sys; sys.argv[0] = 'vlmoe'; from modeling_vlmoe.cli import main; main()"]


def vlmoe(*args):
    return subprocess.run([*VLMOE, *map(str, args)], capture_output=True, text=True, timeout=300)


def test_every_setting_has_a_flag_with_help(vlmoe_here):
    from dataclasses import fields

    from modeling_vlmoe.conversion import UpcycleArguments

    text = vlmoe_here("upcycle", "--help").stdout
    for item in fields(UpcycleArguments):
        assert f"--{item.name.replace('_', '-')}" in text
        assert item.metadata["help"].split()[0] in text


def test_upcycle_from_a_recipe_and_flags(parents, tmp_path):
    recipe = tmp_path / "r.yaml"
    recipe.write_text(f"text_model: {parents / 'llama'}\nvision_model: {parents / 'clip'}\ntext_experts: 4\nseed: 3\n")
    done = vlmoe("upcycle", "--recipe", recipe, "--output-dir", tmp_path / "out", "--text-experts", 2)
    assert done.returncode == 0, done.stderr
    assert "proved equal to its parents" in done.stdout
    receipt = (tmp_path / "out" / "upcycle_receipt.json").read_text()
    assert '"num_experts": 2' in receipt
    assert '"seed": 3' in receipt


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_a_signal_that_ends_it_leaves_nothing(tmp_path, name):
    code = (
        "import os, signal, time, pathlib\n"
        "from modeling_vlmoe import cli\n"
        "from modeling_vlmoe.conversion.output_folder import whole_or_nothing\n"
        f"signal.signal(signal.{name}, signal.SIG_DFL)\n"  # under nohup a child is born deaf to SIGHUP
        "def work():\n"
        f"    with whole_or_nothing(pathlib.Path({str(tmp_path / 'out')!r})):\n"
        f"        os.kill(os.getpid(), signal.{name})\n"
        "        time.sleep(5)\n"
        "cli.app = work\n"
        "cli.main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert "KeyboardInterrupt" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_prints_and_needs_no_output_folder(vlmoe_here, parents):
    done = vlmoe_here(
        "upcycle",
        "--text-model",
        parents / "llama",
        "--vision-model",
        parents / "clip",
        "--dry-run",
    )
    assert done.returncode == 0, done.stderr
    assert "active per token" in done.stdout


def test_a_dense_model_is_made(vlmoe_here, parents, tmp_path):
    done = vlmoe_here(
        "upcycle",
        "--text-model",
        parents / "llama",
        "--vision-model",
        parents / "clip",
        "--dense",
        "--output-dir",
        tmp_path / "out",
    )
    assert done.returncode == 0, done.stderr
    receipt = json.loads((tmp_path / "out" / "upcycle_receipt.json").read_text())
    assert [receipt["settings"][f"{part}_moe"] for part in ("text", "vision", "connector")] == [None] * 3
    assert "router" not in receipt["mapping"]["targets"]
    assert receipt["proof"]["largest_gap"] <= 1e-5


def test_a_native_form_there_and_back(vlmoe_here, parents, tmp_path):
    text, vision = ["--text-model", parents / "llama"], ["--vision-model", parents / "clip"]
    done = vlmoe_here("upcycle", *text, *vision, "--format", "native", "--output-dir", tmp_path / "native")
    assert done.returncode == 0, done.stderr
    assert "llava around mixtral" in done.stdout
    assert "logits in bfloat16, exported" in done.stdout
    done = vlmoe_here("import", "--vlm-model", tmp_path / "native", "--output-dir", tmp_path / "ours")
    assert done.returncode == 0, done.stderr
    assert "proved equal to its parents" in done.stdout
    done = vlmoe_here("export", tmp_path / "ours", "--to", "text", "--dry-run")
    assert done.returncode == 0, done.stderr
    assert "x vlmoe: the vision part is not exported" in done.stdout
    assert "141,280 parameters, 58,336 active per token" in done.stdout  # 2 of 8 experts
    done = vlmoe_here("export", tmp_path / "ours", "--to", "text", "--output-dir", tmp_path / "text")
    assert done.returncode == 0, done.stderr
    assert "mixtral\n" in done.stdout


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--text-model", "someone/nothing", "--vision-model", "someone/nothing"],
            "--text-model someone/nothing is neither",
        ),
        (["--recipe", "/no/such.yaml"], "There is no recipe /no/such.yaml"),
        (["--text-layers", "all"], "text_layers is 'all'; expected layers"),
    ],
)
def test_user_errors_are_one_message_and_code_2(vlmoe_here, tmp_path, flags, message):
    done = vlmoe_here("upcycle", "--output-dir", tmp_path / "out", *flags)
    assert done.returncode == 2
    assert f"vlmoe: {message}" in done.stderr
    assert "Traceback" not in done.stderr
    assert list(Path(tmp_path).iterdir()) == []


def test_unknown_flags_are_refused(vlmoe_here):
    done = vlmoe_here("upcycle", "--tekst-model", "x")
    assert (done.returncode, "No such option" in done.stderr) == (2, True)
