"""What `vlmoe plan` says a step takes is what the step takes."""

import pytest
import torch

from benchmarks.measuring import peak_bytes
from modeling_vlmoe import VLMoEConfig, VLMoEForConditionalGeneration, expert_paths, shared_base
from modeling_vlmoe.finetune import hollow_models, prepare_model
from modeling_vlmoe.finetune.gpus import CPU, GPU, Device
from modeling_vlmoe.finetune.memory_plan import ADAPTER, GRADIENTS, OPTIMIZER, PARTS, WEIGHTS, estimate
from modeling_vlmoe.finetune.memory_trace import MemoryTrace, bytes_of
from modeling_vlmoe.finetune.plan_batch import example_batch
from modeling_vlmoe.finetune.planning import device_here
from tests import models, tiny

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


def measured(config, args, batch, prepare=prepare_model):
    """What the real step takes, without the optimizer: what is held, and how far memory rises."""
    torch.manual_seed(0)
    model = VLMoEForConditionalGeneration(config).to(config.dtype)
    if args.experts_implementation is not None:
        model.set_experts_implementation(args.experts_implementation)
    tuned = prepare(model, args).train()
    if args.activation_checkpointing:
        tuned.activation_checkpointing_enable()

    def step():
        tuned(**batch, num_items_in_batch=torch.tensor(100)).loss.backward()
        tuned.zero_grad(set_to_none=True)

    held = [*tuned.parameters(), *tuned.buffers(), *batch.values()]
    return bytes_of(held) + peak_bytes(step)


@pytest.fixture(scope="module")
def batch():
    """Rows of words of all kinds, so that all experts get some."""
    made = example_batch(models.processor(), ROWS, LENGTH, 1, SIZE)
    ids, generator = made["input_ids"], torch.Generator().manual_seed(0)
    is_image = ids == models.processor().image_token_id
    return made | {"input_ids": torch.where(is_image, ids, torch.randint(6, 290, ids.shape, generator=generator))}


def planned(config, args, batch, device=CPU):
    """What the plan says of that."""
    plan = estimate(config, args, batch, device)
    return plan.peak - plan.parts[OPTIMIZER]


def everything(model, args):
    """A model that is trained whole."""
    return model


ATTENTION = {"lora_targets": ["attention"]}
LEAN = {"activation_checkpointing": True}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("experts", "given"),
    [
        ("dense", LEAN),
        ("full", LEAN),
        ("full", {"train_connector": True}),
        ("full", ATTENTION),
        ("full", ATTENTION | LEAN),
        ("full", ATTENTION | {"experts_implementation": "batched_mm"}),
        ("full", ATTENTION | {"experts_implementation": "eager"}),
        ("full", {"method": "align"}),
        ("delta", {}),
        ("delta", LEAN),
        ("delta", {"method": "align"}),
    ],
    ids=lambda given: given if isinstance(given, str) else "-".join(map(str, given)) or "lora",
)
def test_a_plan_is_what_a_step_takes(experts, given, dtype, arguments, batch):
    config, args = wide_config(experts, dtype), arguments(**given)
    assert planned(config, args, batch) == pytest.approx(measured(config, args, batch), rel=0.15)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("experts", ["full", "delta"])
def test_a_plan_of_training_everything_is_what_it_takes(experts, dtype, arguments, batch, monkeypatch):
    monkeypatch.setattr(hollow_models, "prepare_model", everything)
    config, args = wide_config(experts, dtype), arguments(**LEAN)
    assert planned(config, args, batch) == pytest.approx(measured(config, args, batch, everything), rel=0.15)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("rows", [8, 64, 4096], ids=["many blocks", "some blocks", "one block"])
def test_what_delta_experts_keep_is_planned(rows, dtype, arguments, batch, monkeypatch):
    """Of one block what goes into the activation is kept, of several it is not."""
    config, args = wide_config("delta", dtype), arguments()
    for module in (expert_paths, shared_base):
        monkeypatch.setattr(module, "block_rows", lambda width, dtype: rows)
    assert planned(config, args, batch) == pytest.approx(measured(config, args, batch), rel=0.1)


def test_many_experts_without_adapters_take_what_the_hosts_kernel_keeps(arguments, batch, monkeypatch):
    monkeypatch.setitem(EXPERTS, "full", {"num_experts": 16, "num_experts_per_tok": 8})
    monkeypatch.setattr(expert_paths, "BLOCK_BYTES", 2**20)  # as small beside this batch as it is beside real ones
    config, args = wide_config("full"), arguments(**LEAN, **ATTENTION)
    found = planned(config, args, batch)
    assert found == pytest.approx(measured(config, args, batch), rel=0.05)
    assert found > 1.2 * planned(config, arguments(**LEAN), batch), "LoRA on experts runs by a leaner kernel"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("given", [{}, LEAN, {"method": "align"}], ids=str)
def test_a_plan_for_a_gpu_takes_the_form_that_delta_experts_have_there(given, dtype, arguments, batch, monkeypatch):
    config, args = wide_config("delta", dtype), arguments(**given)
    there, here = planned(config, args, batch, GPU), planned(config, args, batch)
    monkeypatch.setattr(shared_base, "is_masked", lambda *given: True)
    assert there == pytest.approx(measured(config, args, batch), rel=0.05)
    assert there != here


def test_a_gpu_without_grouped_mm_makes_gradients_of_frozen_experts(arguments, monkeypatch):
    """The host's own loop in its place does; of few tokens they are most of what is there for a moment."""
    monkeypatch.setitem(EXPERTS, "full", {"num_experts": 16, "num_experts_per_tok": 2})
    config, batch = wide_config("full"), example_batch(models.processor(), 1, 60, 1, SIZE)
    config.vision_config.num_hidden_layers = 2
    there, old = (planned(config, arguments(**ATTENTION), batch, one) for one in (GPU, Device("cuda", is_old=True)))
    assert old > 1.1 * there


def test_in_half_precision_a_cpu_runs_our_kernel_and_a_gpu_the_hosts(arguments, batch):
    config, args = wide_config("full", "bfloat16"), arguments(**ATTENTION)
    assert planned(config, args, batch, GPU) > 1.03 * planned(config, args, batch)


def test_a_recipe_runs_on_the_cpu_where_it_says_so(arguments):
    assert device_here(arguments(use_cpu=True)) == CPU


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


@pytest.mark.parametrize("name", ["adamw_torch_4bit", "galore_adamw", "lomo"])
def test_raises_when_the_optimizer_is_not_installed(name, arguments, batch):
    with pytest.raises(ValueError, match=f"optim is {name}, which cannot be planned here: .* or choose another, as"):
        estimate(wide_config("dense"), arguments(optim=name), batch)


def test_aligning_adds_no_adapter(arguments, batch):
    plan = estimate(wide_config("full"), arguments(method="align"), batch)
    assert plan.parts[ADAPTER] == 0
    assert plan.parts[OPTIMIZER] > 0


def test_memory_is_counted_while_it_is_held():
    with MemoryTrace() as trace:
        kept = torch.zeros(1000)
        kept + 1
        kept.view(10, 100)
    assert (trace.peak, trace.total) == (8000, 4000)
