"""One command over two processes, spread in each way: the losses and the result are one process', and batches of text
alone beside batches with images do not hang.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from modeling_vlmoe.companions import HISTORY_NAME
from modeling_vlmoe.finetune import finetune, load_finetuned, parse_recipe
from modeling_vlmoe.finetune.scale.configs import shipped_configs
from modeling_vlmoe.finetune.watch.account import NOT_FINITE, Account
from tests.finetune.questions import question, write_rows
from tests.slow import often
from tests.trainers import chats

ROOT = Path(__file__).parents[2]
SCRIPT = Path(__file__).with_name("spread_run.py")
DEEPSPEED = Path(sys.executable).parents[1] / "deepspeed"  # `make deepspeed` puts it there, apart
SECONDS = 200  # a run that hangs is ended
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
ACCELERATE = [str(Path(sys.executable).parent / "accelerate"), "launch", "--config_file"]
SPLIT = ["fsdp_size=2", "save_only_model=true"]
# How each way is started, and what it is told.
WAYS = {
    "alone": ([], []),
    "ddp": (TORCHRUN, []),
    "fsdp2": (TORCHRUN, SPLIT),
    "fsdp_ep": (TORCHRUN, [*SPLIT, "ep_size=2"]),
    "zero3": ([*ACCELERATE, str(shipped_configs()["zero3"])], []),
}
METHODS = {"ddp": ("lora", "full", "align"), "fsdp2": ("full", "lora", "align"), "fsdp_ep": ("full", "align")}
METHODS["zero3"] = METHODS["ddp"]
ROWS = [(way, method) for way, methods in METHODS.items() for method in methods]
# In the default run, one after the other in one pair of processes: to start one takes longer than to train.
OFTEN = [("ddp", "lora"), ("fsdp2", "full")]
STEPS = {
    "max_steps": 4,
    "save_steps": 4,
    "save_total_limit": "null",
    "logging_steps": 1,
    "per_device_train_batch_size": 1,
    "train_sampling_strategy": "sequential",
    "optim": "sgd",
    "learning_rate": 0.01,
    "lr_scheduler_type": "constant",
    "warmup_steps": 0,
    "report_to": "none",
    "use_cpu": "true",
    "disable_tqdm": "true",
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Each step gives one process a row of text alone and the other one with images; `align` gets images only."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "images").mkdir()
    for name in chats.COLOURS:
        chats.picture(name).save(folder / "images" / f"{name}.png")
    mixed = [([], "nothing"), (["red"], "red"), (["red", "blue"], "two"), ([], "none")]
    seen = [(["red"], "red"), (["blue"], "blue"), (["green", "red"], "both"), (["green"], "green")]
    for name, rows in (("mixed", mixed), ("seen", seen)):
        questions = [question([f"images/{colour}.png" for colour in colours], said) for colours, said in rows]
        write_rows(folder / f"{name}.jsonl", questions)
    return folder


def words(base, data, folder, method, way, **given):
    """The settings of a run; alone it accumulates what two processes see together."""
    rows = data / ("seen.jsonl" if method == "align" else "mixed.jsonl")
    values = {"model": base, "data": rows, "output_dir": folder} | STEPS
    values |= {"gradient_accumulation_steps": 2 if way == "alone" else 1} | given
    return [method, *(f"{name}={value}" for name, value in values.items()), *WAYS[way][1]]


def run(way, arguments, script=(str(SCRIPT),), fails=False):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    if way == "zero3":
        assert DEEPSPEED.is_dir(), f"DeepSpeed is not in {DEEPSPEED}. Run `make deepspeed`."
        environment |= {"PYTHONPATH": f"{ROOT}{os.pathsep}{DEEPSPEED}", "DS_ACCELERATOR": "cpu"}
        environment["TORCH_EXTENSIONS_DIR"] = str(DEEPSPEED / "built")  # what it compiles at its first run, a minute
    before = [way] if script == (str(SCRIPT),) else []
    done = subprocess.run(
        [*WAYS[way][0], *script, *before, *arguments],
        capture_output=True,
        text=True,
        timeout=SECONDS,
        cwd=ROOT,
        env=environment,
    )
    assert (done.returncode != 0) == fails, done.stdout[-1500:] + done.stderr[-5000:]
    return done.stderr if fails else done.stdout


def losses(folder, step=4):
    state = json.loads((folder / f"checkpoint-{step}" / "trainer_state.json").read_text())
    return [entry["loss"] for entry in state["log_history"] if "loss" in entry]


def counts(folder):
    """What is trained of each part, and of how many, as the history says."""
    return json.loads((folder / HISTORY_NAME).read_text())[-1]["trained"]


def weights(folder):
    files = [*folder.glob("adapter_model.safetensors"), *folder.glob("model*.safetensors")]
    return {name: value for path in files for name, value in load_file(path).items()}


def check_equal(found, wanted, atol=1e-5):
    assert found.keys() == wanted.keys()
    assert found
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, atol=atol, rtol=1e-4, msg=lambda said, n=name: f"{n}: {said}")


@pytest.fixture(scope="module")
def alone(base, data, tmp_path_factory):
    """One process' result for a method, made once."""
    made = {}

    def build(method):
        if method not in made:
            made[method] = tmp_path_factory.mktemp("alone") / method
            recipe, *given = words(base, data, made[method], method, "alone")
            finetune(parse_recipe(recipe, given))
        return made[method]

    return build


@pytest.fixture(scope="module")
def together(base, data, tmp_path_factory):
    """What the rows of the default run print, and their folder."""
    folder, arguments = tmp_path_factory.mktemp("together"), []
    for way, method in OFTEN:
        arguments += ["--then", way] if arguments else []
        arguments += words(base, data, folder / way, method, way)
    return run(OFTEN[0][0], arguments), folder


@pytest.mark.parametrize("row", often(ROWS, *OFTEN), ids="-".join)
def test_two_processes_give_one_process_losses_and_result(row, base, data, alone, tmp_path, request):
    """Losses to 1e-5, weights to 1e-5; FSDP modules, split experts and leaf modules are looked for before training."""
    way, method = row
    if row in OFTEN:
        said, folder = request.getfixturevalue("together")
    else:
        said, folder = run(way, words(base, data, tmp_path / way, method, way)), tmp_path
    assert f"{way} is spread as it should be" in said
    found, wanted = folder / way, alone(method)
    assert losses(found) == pytest.approx(losses(wanted), abs=1e-5)
    check_equal(weights(found), weights(wanted))
    assert counts(found) == counts(wanted)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("way", "method"), [("fsdp2", "lora"), ("fsdp2", "full"), ("fsdp_ep", "full"), ("zero3", "full")]
)
def test_a_result_and_its_checkpoints_are_loaded_by_one_process(way, method, base, data, tmp_path):
    """What the processes write is a whole model, or an adapter, as the history of the folder tells it."""
    given = {"merge": "true"} if method == "lora" else {}
    run(way, words(base, data, tmp_path / "out", method, way, **given))
    model, processor = load_finetuned(tmp_path / "out")
    assert processor.image_token_id is not None
    last, _ = load_finetuned(tmp_path / "out" / "checkpoint-4")
    check_equal(last.state_dict(), model.state_dict(), atol=0)
    if method == "lora":
        merged, _ = load_finetuned(tmp_path / "out" / "merged")
        check_equal(merged.state_dict(), model.merge_and_unload().state_dict())


@pytest.mark.slow
@pytest.mark.parametrize(("way", "method"), [("ddp", "full"), ("ddp", "lora"), ("zero3", "full")])
def test_a_resumed_run_is_the_uninterrupted_one(way, method, base, data, tmp_path):
    whole, again = tmp_path / "whole", tmp_path / "again"
    given = {"save_steps": 2}
    run(way, words(base, data, whole, method, way, **given))
    shutil.copytree(whole / "checkpoint-2", again / "checkpoint-2")
    shutil.copy(whole / "finetune_settings.yaml", again)
    run(way, words(base, data, again, method, way, resume_from_checkpoint=again / "checkpoint-2", **given))
    assert losses(again) == pytest.approx(losses(whole), abs=1e-6)
    check_equal(weights(again), weights(whole), atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "way", "method"),
    [("accelerate", "ddp", "lora"), ("accelerate", "fsdp_ep", "full"), ("torchrun", "fsdp2", "full")],
)
def test_the_command_itself_is_started_by_a_launcher(launcher, way, method, base, data, alone, tmp_path):
    """By accelerate with the shipped configuration."""
    launch = TORCHRUN if launcher == "torchrun" else [*ACCELERATE, str(shipped_configs()[way])]
    given = words(base, data, tmp_path / "out", method, way)
    done = subprocess.run(
        [*launch, "-m", "modeling_vlmoe", "finetune", *given],
        capture_output=True,
        text=True,
        timeout=SECONDS,
        cwd=tmp_path,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert losses(tmp_path / "out") == pytest.approx(losses(alone(method)), abs=1e-5)


@pytest.mark.slow
def test_a_split_that_cannot_be_is_one_message_in_every_process(base, data, tmp_path):
    given = words(base, data, tmp_path / "out", "full", "fsdp2", ep_size=3)
    said = run("fsdp2", given, script=("-m", "modeling_vlmoe", "finetune"), fails=True)
    assert "ep_size is 3, which does not divide fsdp_size 2; choose one that does." in said
    assert 'Traceback (most recent call last):\n  File "' + str(ROOT / "finetune") not in said
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize("way", ["ddp", "fsdp2", "zero3"])
def test_what_is_not_finite_ends_all_processes_before_it_is_written(way, base, data, tmp_path):
    """In words, once for each process; the checkpoints before stay as they were."""
    folder = tmp_path / "out"
    given = words(base, data, folder, "full", way, learning_rate=1e30, save_steps=1, max_grad_norm=0)
    said = run(way, given, fails=True)
    assert "Training stopped at step " in said
    assert "Lower the learning rate (1e+30; " in said
    (alarm,) = [one for one in Account.read(folder).notices if one.kind == NOT_FINITE]
    assert alarm.words.splitlines()[0] in said
    assert "First not finite: what the norm of layer 0 of the ViT (model.vision_tower." in alarm.words
    assert not (folder / HISTORY_NAME).exists()
    assert all(value.isfinite().all() for one in folder.glob("checkpoint-*") for value in weights(one).values())


def documented_loop():
    page = (ROOT / "docs" / "scale.md").read_text(encoding="utf-8")
    return next(block for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "tp_size" in block)


@pytest.mark.slow
def test_the_documented_loop_over_a_tensor_parallel_model_gives_one_process_losses(base, data, tmp_path):
    code = (
        documented_loop()
        .replace('"my-vlmoe"', repr(str(base)))
        .replace('"questions.jsonl"', repr(str(data / "mixed.jsonl")))
    )
    (tmp_path / "loop.py").write_text(code.replace('"tuned"', repr(str(tmp_path / "tuned"))))
    found = []
    for launch in ([sys.executable], TORCHRUN):
        done = subprocess.run(
            [*launch, str(tmp_path / "loop.py")], capture_output=True, text=True, timeout=SECONDS, cwd=tmp_path,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-4000:]
        found.append(([float(one) for one in re.findall(r"loss ([\d.]+)", done.stdout)], weights(tmp_path / "tuned")))
        shutil.rmtree(tmp_path / "tuned")
    (one, one_weights), (two, two_weights) = found
    assert len(one) == 4
    assert two == pytest.approx(one, abs=1e-4)
    check_equal(two_weights, one_weights, atol=1e-4)
