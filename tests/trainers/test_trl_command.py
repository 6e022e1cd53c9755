"""TRL's own command line, on a folder: TRL runs its scripts in a process that does not import this package.

With `--trust_remote_code` the folder's own code trains, whether or not the package is there.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForImageTextToText

from tests.trainers import chats

SETTINGS = (
    "--trust_remote_code --max_steps 2 --use_cpu true --bf16 false --report_to none --logging_steps 1 "
    "--per_device_train_batch_size 2 --max_length null --learning_rate 1e-2"
)
LORA = (
    "--use_peft --lora_r 2 --lora_dropout 0 --lora_target_modules q_proj v_proj "
    "--lora_target_parameters mlp.experts.gate_up_proj mlp.experts.down_proj --lora_modules_to_save router"
)
# Found by every process of the command, by PYTHONPATH.
WITHOUT_PACKAGE = "import sys\nsys.modules['modeling_vlmoe'] = None\n"
LOAD = """
from transformers import AutoModelForImageTextToText, AutoProcessor
for folder in {folders!r}:
    model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True)
    assert type(model).__module__.startswith("transformers_modules."), type(model)
    assert any("lora_A" in name for name, _ in model.named_parameters())
    assert type(AutoProcessor.from_pretrained(folder, trust_remote_code=True)).__name__ == "VLMoEProcessor"
"""


def start(command, base, rows, folder, environment, more=""):
    """Starts the command on rows in a parquet file."""
    (folder / "data").mkdir(parents=True)
    rows.to_parquet(folder / "data" / "train.parquet")
    given = f"--model_name_or_path {base} --dataset_name {folder / 'data'} --output_dir {folder / 'out'}"
    return subprocess.Popen(
        [str(Path(sys.executable).with_name("trl")), command, *f"{given} {SETTINGS} {more}".split()],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | environment,
    )


@pytest.fixture(scope="module")
def commands(base, tmp_path_factory):
    """Both commands, side by side: for each its folder, and what it printed."""
    folder = tmp_path_factory.mktemp("commands")
    (folder / "sitecustomize.py").write_text(WITHOUT_PACKAGE)
    started = {
        "sft": start("sft", base, chats.messages(), folder / "sft", {"PYTHONPATH": str(folder)}, LORA),
        "dpo": start("dpo", base, chats.preferences(), folder / "dpo", {}),
    }
    finished = {}
    for name, process in started.items():
        output, errors = process.communicate(timeout=300)
        finished[name] = (process.returncode, folder / name / "out", output, errors)
    return finished


def finish(commands, name):
    """The folder that a command has written, after two steps."""
    code, folder, output, errors = commands[name]
    assert code == 0, errors[-3000:]
    losses = [float(loss) for loss in re.findall(r"'loss': '?([0-9.e-]+)", output)]
    assert len(losses) == 2
    return folder


@pytest.mark.slow
def test_trl_sft_without_the_package(commands, run_without_package):
    folder = finish(commands, "sft")
    run_without_package(LOAD.format(folders=[str(folder), str(folder / "checkpoint-2")]))
    model = AutoModelForImageTextToText.from_pretrained(folder)
    assert type(model).__module__ == "modeling_vlmoe.modeling_vlmoe"


@pytest.mark.slow
def test_trl_dpo_where_the_package_is_installed(commands):
    folder = finish(commands, "dpo")
    model = AutoModelForImageTextToText.from_pretrained(folder / "checkpoint-2")
    assert type(model).__module__ == "modeling_vlmoe.modeling_vlmoe"
