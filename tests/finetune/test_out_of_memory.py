"""What is said of memory before a run and when it runs out: of the data's largest batch, with what would take less."""

import os
import subprocess
import sys

import pytest
import torch
from PIL import Image

from modeling_vlmoe import VLMoEConfig, cli
from modeling_vlmoe.finetune import planning
from modeling_vlmoe.finetune.gpus import CPU, GPU
from modeling_vlmoe.finetune.memory_plan import estimate
from modeling_vlmoe.finetune.plan_batch import example_batch, largest_rows
from modeling_vlmoe.finetune.planning import RunMemory, explained, is_out_of_memory
from modeling_vlmoe.finetune.remedies import _changes, find_remedies
from modeling_vlmoe.finetune.smaller_batches import DataBatches, ExampleBatches, half_of_images, half_of_text
from modeling_vlmoe.finetune.watch.account import NO_MEMORY, Account
from tests import models
from tests.finetune.questions import question, write_rows
from tests.finetune.test_memory_plan import SIZE, measured, wide_config

LENGTH = 60


@pytest.fixture
def picture(tmp_path):
    def save(name, side=24):
        Image.new("RGB", (side, side), "red").save(tmp_path / name)
        return str(tmp_path / name)

    return save


@pytest.fixture
def example(processor):
    return ExampleBatches(processor, LENGTH, 1, SIZE)


def changes_of(config, args, example):
    return {change.how: change for change in _changes(config, args, example, 1)}


def test_delta_experts_take_less_than_whole_ones(arguments, example):
    """Of few tokens: what makes the difference is the weights."""
    config, args, batch = wide_config("full"), arguments(), example_batch(models.processor(), 1, LENGTH, 1, SIZE)
    config.text_moe.num_experts = 16
    change = next(one for how, one in changes_of(config, args, example).items() if how.startswith("vlmoe compress"))
    assert estimate(change.config, args, batch).peak < 0.9 * estimate(config, args, batch).peak
    assert config.moe("text").expert_type == "full"


@pytest.mark.parametrize(("experts", "is_named"), [("full", True), ("delta", False), ("dense", False)])
def test_compressing_is_named_where_experts_are_whole(experts, is_named, arguments, example):
    names = changes_of(wide_config(experts), arguments(), example)
    assert any(how.startswith("vlmoe compress") for how in names) == is_named


@pytest.mark.slow
def test_attention_alone_is_no_remedy_where_it_takes_more(arguments):
    """Experts with LoRA run by a leaner kernel than those without."""
    config, args = wide_config("full"), arguments(activation_checkpointing=True, per_device_train_batch_size=2)
    config.text_moe.num_experts, config.text_moe.num_experts_per_tok = 16, 8
    example = ExampleBatches(models.processor(), 200, 1, SIZE)
    plan = estimate(config, args, example(2)[0])
    named = [remedy.how for remedy in find_remedies(config, args, example, plan, CPU)]
    assert "lora_targets=attention" not in named
    assert len(named) >= 3


@pytest.mark.parametrize(("experts", "device"), [("full", CPU), ("delta", GPU)], ids=["full-cpu", "delta-gpu"])
@pytest.mark.parametrize(
    "given",
    [
        {"method": "align"},
        pytest.param({}, marks=pytest.mark.slow),
        pytest.param({"lora_r": 1, "lora_targets": ["attention"], "train_routers": False}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_there_are_three_remedies_of_what_is_small_already(given, experts, device, arguments, example):
    least = {"per_device_train_batch_size": 1, "activation_checkpointing": True, "optim": "adamw_bnb_8bit"}
    config, args = wide_config(experts, "bfloat16"), arguments(**least | given)
    plan = estimate(config, args, example(1)[0], device)
    found = list(find_remedies(config, args, example, plan, device))
    assert len(found) >= 3
    assert all(remedy.plan.peak < plan.peak for remedy in found)


def test_fewer_and_smaller_images_are_remedies_where_they_take_less(processor):
    hows = [cut.how for cut in ExampleBatches(processor, 100, 2, SIZE).cuts(1)]
    assert hows == ["--length 75", "--images 1"], "the ViT's size is fixed"


def test_rows_are_cut_in_text_and_images():
    row = question(["a.png", "b.png", "c.png"], "red and blue", "which?!")
    texts = [
        part["text"] for message in half_of_text(row)["messages"] for part in message["content"] if "text" in part
    ]
    assert texts == ["whic", "red an"]
    fewer = half_of_images(row)
    assert fewer["images"] == ["a.png"]
    assert [part["type"] for part in fewer["messages"][0]["content"]] == ["image", "text"]
    assert half_of_images(question(["a.png"], "red"))["images"] == ["a.png"]


def test_data_is_cut_in_its_own_words(processor, picture):
    rows = [question([picture("a.png"), picture("b.png")], "red " * 20)] * 2
    hows = [cut.how for cut in DataBatches(processor, rows).cuts(2)]
    assert hows[0].startswith("data with rows of at most ")
    assert hows[1:] == ["data with at most 1 images a row"]


def test_the_largest_rows_are_found_by_their_tokens(processor, picture):
    """A long text beats an image, and the row with the most pixels is found beside it."""
    rows = [question([picture("a.png")], "red"), question([], "red " * 150), question([picture("b.png")] * 2, "red")]
    assert largest_rows(processor, rows) == (1, 2)
    assert largest_rows(processor, rows[:1]) == (0, 0)
    sizes = {name: list(value.shape) for name, value in DataBatches(processor, rows)(3)[0].items()}
    assert sizes["input_ids"][0] == 3
    assert sizes["pixel_values"][0] == 4
    assert len(DataBatches(processor, rows)(1)) == 2


def test_the_line_before_a_run_is_what_its_largest_batch_takes(processor, picture, arguments):
    long, seen = question([], "red " * 150), question([picture("a.png")], "red")
    config, args = wide_config("delta"), arguments(per_device_train_batch_size=2, train_connector=True)
    memory = RunMemory(config, models.processor(), [seen, long] * 4, args)
    plan, make_batches, _ = memory.plan()
    real = make_batches.collate([seen, long])
    assert plan.length == real["input_ids"].shape[1]
    assert plan.peak == pytest.approx(measured(config, args, real) + plan.parts["optimizer"], rel=0.15)


def test_only_errors_of_memory_are_taken_for_them():
    with pytest.raises(RuntimeError) as failed:
        torch.empty(2**55)
    assert is_out_of_memory(failed.value)
    assert is_out_of_memory(MemoryError())
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory."))
    assert not is_out_of_memory(RuntimeError("shapes do not fit"))


def test_what_took_the_memory_is_said_with_three_remedies(dense_base, processor, arguments):
    rows = [question([], "red " * 9)] * 8
    config = VLMoEConfig.from_pretrained(dense_base)
    memory = RunMemory(config, processor, rows, arguments(per_device_train_batch_size=8))
    with pytest.raises(ValueError, match="Memory ran out: ") as failed, explained(memory):
        torch.empty(2**55)
    said = str(failed.value).splitlines()
    ways = said[said.index("With less memory:") + 1 :]
    assert len(ways) == 3
    assert all(way.rstrip(")").split(": ")[1].split()[1].startswith("MB") for way in ways), ways


def test_errors_that_name_each_other_are_accounted_for(dense_base, processor, arguments):
    memory = RunMemory(VLMoEConfig.from_pretrained(dense_base), processor, [question([], "red")] * 2, arguments())
    first, second = MemoryError(), RuntimeError("while cleaning up")
    first.__cause__, second.__context__ = second, first
    with pytest.raises(ValueError, match="Memory ran out: MemoryError"), explained(memory):
        raise first


# The process gets a limit where training begins: threads have their stacks by then, and a tensor is what is refused.
LIMITED = """
import resource, sys
from modeling_vlmoe import cli
from modeling_vlmoe.finetune import train
begin = train._train
def limited(*given):
    held = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (held + 600 * 2**20,) * 2)
    begin(*given)
train._train = limited
sys.argv = ["vlmoe", *sys.argv[1:]]
cli.main()
"""


def test_where_there_is_too_little_even_for_an_account_the_estimate_is_said(
    dense_base, processor, arguments, monkeypatch
):
    memory = RunMemory(VLMoEConfig.from_pretrained(dense_base), processor, [question([], "red")] * 2, arguments())
    said = memory.before()
    monkeypatch.setattr(planning, "find_remedies", lambda *_: torch.empty(2**55))
    with pytest.raises(ValueError, match="ask `vlmoe plan` in a new process") as failed, explained(memory):
        torch.empty(2**55)
    assert said.startswith("Memory: about ")
    assert said in str(failed.value)


def test_a_run_that_needs_too_much_ends_with_an_account(dense_base, tmp_path):
    text = "what colour is the shape? " * 32
    write_rows(tmp_path / "rows.jsonl", [question([], text, text) | {"id": row} for row in range(200)])
    given = {"model": dense_base, "data": tmp_path / "rows.jsonl", "output_dir": tmp_path / "out", "use_cpu": "true",
             "report_to": "none", "per_device_train_batch_size": 200, "max_length": "null",
             "activation_checkpointing": "false"}  # fmt: skip
    words = ["finetune", "lora", *(f"{name}={value}" for name, value in given.items())]
    done = subprocess.run([sys.executable, "-c", LIMITED, *words], capture_output=True, text=True,
                          env=os.environ | {"OMP_NUM_THREADS": "2"})  # fmt: skip
    assert done.returncode == cli.USER_ERROR, done.stderr[-2000:]
    assert "Traceback" not in done.stderr
    assert "Memory: about " in done.stdout
    assert "vlmoe: Memory ran out: " in done.stderr
    assert "per_device_train_batch_size=1" in done.stderr
    (alarm,) = Account.read(tmp_path / "out").notices
    assert alarm.kind == NO_MEMORY
    assert alarm.words in done.stderr
    assert "(in step 1, with rows 1, " in alarm.words
