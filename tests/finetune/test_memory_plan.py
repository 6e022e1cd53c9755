"""`vlmoe plan`: what it says a step takes is what the step takes."""

import os
import subprocess
import sys

import pytest
import torch

from benchmarks.measuring import peak_bytes
from modeling_vlmoe import VLMoEConfig, VLMoEForConditionalGeneration, cli
from modeling_vlmoe.finetune import prepare_model
from modeling_vlmoe.finetune.gpus import gpu_bytes
from modeling_vlmoe.finetune.memory_plan import ADAPTER, GRADIENTS, OPTIMIZER, PARTS, WEIGHTS, estimate
from modeling_vlmoe.finetune.memory_trace import MemoryTrace, bytes_of
from modeling_vlmoe.finetune.plan_batch import example_batch, longest_row
from modeling_vlmoe.finetune.planning import RunMemory, explained, is_out_of_memory
from modeling_vlmoe.finetune.remedies import _changes
from tests import hosts, models, tiny
from tests.finetune.host_rows import template
from tests.finetune.questions import question, write_rows

WIDE = {"hidden_size": 128, "intermediate_size": 512, "vocab_size": 2000, "num_hidden_layers": 2}
FULL = {"num_experts": 4, "num_experts_per_tok": 2}
EXPERTS = {"dense": None, "full": FULL, "delta": FULL | {"expert_type": "delta", "expert_rank": 8}}
SIZE = (24, 24)
LENGTH, ROWS = 200, 2


def wide_config(experts, dtype="float32"):
    """Wide enough for weights and activations to be more than the rest."""
    return VLMoEConfig(
        text_config=tiny.text_config("llama", **WIDE),
        vision_config=tiny.vision_config("siglip"),
        text_moe=EXPERTS[experts],
        image_token_id=models.processor().image_token_id,
        dtype=dtype,
    )


def measured(config, args, batch):
    """What the real step takes, without the optimizer: what is held, and how far memory rises."""
    torch.manual_seed(0)
    model = VLMoEForConditionalGeneration(config).to(config.dtype)
    tuned = prepare_model(model, args).train()
    if args.activation_checkpointing:
        tuned.activation_checkpointing_enable()

    def step():
        tuned(**batch, num_items_in_batch=torch.tensor(100)).loss.backward()
        tuned.zero_grad(set_to_none=True)

    held = [*tuned.parameters(), *tuned.buffers(), *batch.values()]
    return bytes_of(held) + peak_bytes(step)


@pytest.fixture(scope="module")
def batch():
    return example_batch(models.processor(), ROWS, LENGTH, 1, SIZE)


@pytest.mark.parametrize(
    ("experts", "dtype", "checkpointing"),
    [*((kind, "float32", True) for kind in EXPERTS), ("full", "float32", False), ("delta", "bfloat16", False)],
)
def test_a_plan_is_what_a_step_takes(experts, dtype, checkpointing, arguments, batch):
    args = arguments(train_connector=True, activation_checkpointing=checkpointing)
    plan = estimate(wide_config(experts, dtype), args, batch)
    found = measured(wide_config(experts, dtype), args, batch)
    assert plan.peak - plan.parts[OPTIMIZER] == pytest.approx(found, rel=0.15)


def test_parts_are_what_they_are_called_and_add_up(arguments, batch):
    args = arguments(gradient_accumulation_steps=2)
    plan = estimate(wide_config("full"), args, batch)
    model = VLMoEForConditionalGeneration(wide_config("full"))
    own = bytes_of([*model.parameters(), *model.buffers()])
    tuned = prepare_model(model, args)
    trained = bytes_of(one for one in tuned.parameters() if one.requires_grad)
    assert tuple(plan.parts) == PARTS
    assert sum(plan.parts.values()) == plan.peak
    assert plan.parts[WEIGHTS] == own
    assert plan.parts[ADAPTER] == trained == plan.parts[GRADIENTS]
    assert plan.parts[OPTIMIZER] == 2 * trained
    assert plan.num_trained * 4 == trained


def test_tied_weights_count_once(arguments, batch):
    def weights(is_tied):
        config = wide_config("dense")
        config.tie_word_embeddings = config.text_config.tie_word_embeddings = is_tied
        return estimate(config, arguments(), batch).parts[WEIGHTS]

    assert weights(False) - weights(True) == WIDE["hidden_size"] * WIDE["vocab_size"] * 4


@pytest.mark.parametrize(("optimizer", "states"), [("adamw_torch", 2), ("sgd", 0)])
def test_the_optimizer_keeps_what_it_keeps(optimizer, states, arguments, batch):
    plan = estimate(wide_config("dense"), arguments(optim=optimizer), batch)
    assert plan.parts[OPTIMIZER] == states * plan.parts[ADAPTER]


def test_aligning_adds_no_adapter(arguments, batch):
    plan = estimate(wide_config("full"), arguments(method="align"), batch)
    assert plan.parts[ADAPTER] == 0
    assert plan.parts[OPTIMIZER] > 0


def test_delta_experts_take_less_than_whole_ones(arguments):
    """Of few tokens: what makes the difference is the weights."""
    config, args, batch = wide_config("full"), arguments(), example_batch(models.processor(), 1, 60, 1, SIZE)
    config.text_moe.num_experts = 16
    change = next(one for one in _changes(config, args) if one.how.startswith("vlmoe compress"))
    assert estimate(change.config, args, batch).peak < 0.9 * estimate(config, args, batch).peak
    assert config.moe("text").expert_type == "full"


def test_memory_is_counted_while_it_is_held():
    with MemoryTrace() as trace:
        kept = torch.zeros(1000)
        kept + 1
        kept.view(10, 100)
    assert (trace.peak, trace.total) == (8000, 4000)


@pytest.mark.parametrize(("given", "size"), [("24", 24), ("24GB", 24), ("rtx4090", 24), ("NVIDIA H100", 80)])
def test_gpus_go_by_name_and_by_size(given, size):
    assert gpu_bytes(given) == size * 10**9


def test_the_longest_row_has_most_images_then_most_text():
    rows = [question([], "a" * 90), question(["x.png"], "a"), question(["x.png"], "a" * 9)]
    assert longest_row(rows) == 2


@pytest.fixture
def vlmoe(monkeypatch, capsys):
    """Runs a command in this process; returns its exit code and what it said."""

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["vlmoe", *map(str, words)])
        monkeypatch.setattr(cli.signal, "signal", lambda *_: None)
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        said = capsys.readouterr()
        return stopped.value.code or 0, said.out, said.err

    return run


def test_the_command_says_parts_and_fit_without_reading_weights(vlmoe, base, tmp_path):
    for file in base.iterdir():
        if file.suffix != ".safetensors":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    code, said, _ = vlmoe("plan", tmp_path, "--batch-size", 2, "--length", 80, "--gpu", "RTX 4090")
    assert code == 0
    assert f"{tmp_path}, lora: 2 x 80 tokens, 1 image each" in said
    assert all(part in said for part in (*PARTS, "peak"))
    assert "It fits on 24.00 GB" in said
    assert "With less memory" not in said


def test_the_command_names_what_would_take_less(vlmoe, dense_base):
    given = ["activation_checkpointing=false", "--batch-size", 4, "--length", 80, "--gpu", "0.5"]
    code, said, _ = vlmoe("plan", dense_base, "lora", *given)
    assert code == 0
    assert "It does not fit on 0.50 GB" in said
    named = ("activation_checkpointing=true", "per_device_train_batch_size=1", "method=align")
    assert all(remedy in said for remedy in named), said


def test_the_command_takes_a_dense_vlm_of_the_hosts(vlmoe, tmp_path):
    hosts.save(tmp_path, "qwen2_5_vl")
    (tmp_path / "chat_template.jinja").write_text(template("qwen2_5_vl"))
    code, said, errors = vlmoe("plan", tmp_path, "--length", 64, "--image-size", "48x40", "--gpu", 8)
    assert code == 0, errors
    assert "It fits on 8.00 GB" in said


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--gpu", "Voodoo"], "--gpu is 'Voodoo'; expected GB, as 24 or 24GB, or one of T4,"),
        (["--length", "5"], "length is 5, but a question, its answer and the images' tokens are"),
        (["--image-size", "big"], "--image-size is 'big'; expected pixels"),
        (["lora_ranks=3"], "has unknown keys: lora_ranks"),
        (["nothing.yaml"], "nothing.yaml"),
    ],
)
def test_refusals_are_one_message_and_exit_2(vlmoe, base, words, message):
    code, said, errors = vlmoe("plan", base, *words)
    assert code == cli.USER_ERROR
    assert message in errors
    assert said == ""


def test_raises_when_the_model_is_no_vlm_of_ours(vlmoe, tmp_path):
    tiny.save_text_parent(tmp_path, "llama")
    code, _, errors = vlmoe("plan", tmp_path)
    assert code == cli.USER_ERROR
    assert "is a llama model; expected a vlmoe one" in errors


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


LIMITED = """
import resource, sys
import modeling_vlmoe.finetune.train
from modeling_vlmoe import cli
held = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (held + 120 * 2**20,) * 2)
sys.argv = ["vlmoe", *sys.argv[1:]]
cli.main()
"""


def test_a_run_that_needs_too_much_ends_with_an_account(dense_base, tmp_path):
    text = "what colour is the shape? " * 8
    write_rows(tmp_path / "rows.jsonl", [question([], text, text) | {"id": row} for row in range(200)])
    given = {"model": dense_base, "data": tmp_path / "rows.jsonl", "output_dir": tmp_path / "out", "use_cpu": "true",
             "report_to": "none", "per_device_train_batch_size": 200, "max_length": "null",
             "activation_checkpointing": "false"}  # fmt: skip
    words = ["finetune", "lora", *(f"{name}={value}" for name, value in given.items())]
    done = subprocess.run([sys.executable, "-c", LIMITED, *words], capture_output=True, text=True, env=os.environ)
    assert done.returncode == cli.USER_ERROR, done.stderr[-2000:]
    assert "Traceback" not in done.stderr
    assert "Memory: about " in done.stdout
    assert "vlmoe: Memory ran out: " in done.stderr
    assert "per_device_train_batch_size=1" in done.stderr
