"""PEFT's own ways with a sparse model: what is trained, saved, loaded, merged, switched, and what is refused."""

import copy
import logging
import subprocess
import sys

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.hotswap import hotswap_adapter
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

from modeling_vlmoe import VLMoEConfig, VLMoEForConditionalGeneration
from modeling_vlmoe.conversion.backbones.tiny_configs import tiny_config
from modeling_vlmoe.finetune import FinetuneArguments, lora_config, parse_recipe, prepare_model
from modeling_vlmoe.finetune.settings import FinetuneSettings
from tests import tiny
from tests.finetune.test_adapters import ATTENTION, CONNECTOR, EXPERTS, LAYERS, ROUTERS, TEXT, attention, trained
from tests.models import batch

pytestmark = [
    pytest.mark.filterwarnings("ignore:The following rank_pattern keys:RuntimeWarning"),  # peft 0.21, falsely
    pytest.mark.filterwarnings("ignore:Adapter default was active which is now deleted:UserWarning"),
]
STACKS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
QUERIES = r".*language_model.*\.(q_proj|v_proj)"
# Both ways to train routers: whole, and by LoRA.
WHOLE = {"target_parameters": STACKS, "modules_to_save": ["router"]}
ADAPTED = {"target_parameters": [*STACKS, "mlp.router.weight"]}
ROUTER_WAYS = pytest.mark.parametrize("way", [WHOLE, ADAPTED], ids=["whole routers", "LoRA routers"])


def wrap(model, seed=0, name="default", **fields):
    """The model with an adapter that does something: PEFT's own starts as nothing."""
    model = get_peft_model(model, LoraConfig(r=2, target_modules=QUERIES, **fields), adapter_name=name)
    redraw(model, name, seed)
    return model.eval()


@torch.no_grad()
def redraw(model, name, seed):
    generator = torch.Generator().manual_seed(seed)
    for path, parameter in model.named_parameters():
        if f".{name}." in path and ("lora_B" in path or "modules_to_save" in path):
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)


@pytest.fixture
def inputs(model):
    made = batch((1, 2))
    made["input_ids"] = made["input_ids"].masked_fill(made["input_ids"] == 300, model.config.image_token_id)
    return made


@torch.no_grad()
def logits(model, inputs):
    return model.eval()(**inputs).logits


def assert_equal(found, wanted, atol=0.0):
    torch.testing.assert_close(found, wanted, rtol=0, atol=atol)


def reload(base):
    return AutoModelForImageTextToText.from_pretrained(base)


def count(model, word):
    return sum(value.numel() for name, value in model.named_parameters() if value.requires_grad and word in name)


# What is trained


def test_whole_routers_are_trained(model):
    named = {name for name in trained(wrap(model, **WHOLE)) if TEXT in name}
    assert named == attention(TEXT, LAYERS, {"q_proj", "v_proj"}) | EXPERTS | ROUTERS


def test_routers_get_lora(model):
    named = {name for name in trained(wrap(model, **ADAPTED)) if TEXT in name}
    routers = {f"lora:{TEXT}.{layer}.mlp.router" for layer in LAYERS}
    assert named == attention(TEXT, LAYERS, {"q_proj", "v_proj"}) | EXPERTS | routers


def test_every_expert_has_a_pair_of_its_own(model):
    model = get_peft_model(model, lora_config(model, lora_r=3, lora_targets=["experts"], train_routers=False))
    num_experts, width, expert_width = 4, 32, 48
    gate_up, down = width + 2 * expert_width, expert_width + width
    assert count(model, "lora_") == len(LAYERS) * num_experts * 3 * (gate_up + down)


def test_lora_config_needs_no_recipe(model, base):
    assert trained(get_peft_model(model, lora_config(model))) == (
        attention(TEXT, LAYERS, ATTENTION["llama"]) | EXPERTS | ROUTERS
    )
    config = lora_config(reload(base), FinetuneSettings(lora_r=8), lora_targets=["experts"], use_rslora=True)
    assert (config.r, config.use_rslora, config.target_modules) == (8, True, set())
    model = get_peft_model(reload(base), lora_config(reload(base), lora_targets=["attention"], train_connector=True))
    assert trained(model) == attention(TEXT, LAYERS, ATTENTION["llama"]) | ROUTERS | CONNECTOR


def test_lora_config_takes_a_folder_for_its_model(model, base):
    given = {"lora_parts": ["text", "vision"], "lora_r": 3, "train_connector": True}
    assert lora_config(base, **given).to_dict() == lora_config(model, **given).to_dict()


def test_rank_pattern_on_one_expert_tensor_changes_that_rank_alone(model, base):
    tensor = f"{TEXT}.1.mlp.experts.gate_up_proj"
    plain = get_peft_model(model, lora_config(model))
    patterned = get_peft_model(reload(base), lora_config(reload(base), rank_pattern={tensor: 2}))
    shapes = {name: value.shape for name, value in plain.named_parameters()}
    unlike = {name: value.shape for name, value in patterned.named_parameters() if value.shape != shapes[name]}
    prefix = f"base_model.model.{TEXT}.1.mlp.experts"  # the outer pair; that of down_proj is inside
    assert unlike == {f"{prefix}.lora_A.default.weight": (8, 32), f"{prefix}.lora_B.default.weight": (96, 8)}


# Saving and loading

FRESH = """
import sys, torch
from peft import AutoPeftModel
from safetensors.torch import load_file, save_file
torch.set_num_threads(1)
assert "modeling_vlmoe" not in sys.modules
model = AutoPeftModel.from_pretrained(sys.argv[1], import_allowlist=["modeling_vlmoe"])
with torch.no_grad():
    save_file({"logits": model.eval()(**load_file(sys.argv[2])).logits.contiguous()}, sys.argv[3])
"""


@ROUTER_WAYS
def test_a_saved_adapter_is_loaded_exactly_by_every_way(way, model, base, inputs, tmp_path):
    tuned = wrap(model, **way)
    tuned.save_pretrained(tmp_path / "adapter")
    wanted = logits(tuned, inputs)
    assert (wanted - logits(reload(base), inputs)).abs().max() > 1e-2
    assert_equal(logits(PeftModel.from_pretrained(reload(base), tmp_path / "adapter"), inputs), wanted)
    assert_equal(logits(AutoModelForImageTextToText.from_pretrained(tmp_path / "adapter"), inputs), wanted)
    loaded = reload(base)
    loaded.load_adapter(str(tmp_path / "adapter"))
    assert_equal(logits(loaded, inputs), wanted)


def test_auto_peft_model_imports_the_package_in_a_fresh_process(model, inputs, tmp_path):
    tuned = wrap(model, **WHOLE)
    tuned.save_pretrained(tmp_path / "adapter")
    files = [tmp_path / "adapter", tmp_path / "inputs.safetensors", tmp_path / "logits.safetensors"]
    save_file(inputs, files[1])
    command = [sys.executable, "-c", FRESH, *map(str, files)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert_equal(load_file(files[2])["logits"], logits(tuned, inputs))


# Merging


@ROUTER_WAYS
def test_merging_changes_nothing_and_unmerging_gives_the_weights_back(way, model, base, inputs):
    tuned, before = wrap(model, **way), reload(base).state_dict()
    wanted = logits(tuned, inputs)
    tuned.merge_adapter()
    assert_equal(logits(tuned, inputs), wanted, atol=1e-5)
    tuned.unmerge_adapter()
    assert_equal(logits(tuned, inputs), wanted, atol=1e-5)
    for name, value in tuned.unload().state_dict().items():
        if "router" not in name or way is ADAPTED:  # a router trained whole stays as it was trained
            assert_equal(value, before[name], atol=1e-6)


@ROUTER_WAYS
def test_a_merged_model_equals_its_adapter_and_is_an_ordinary_checkpoint(way, model, inputs, tmp_path):
    tuned = wrap(model, **way)
    wanted = logits(tuned, inputs)
    merged = tuned.merge_and_unload(safe_merge=True)
    assert_equal(logits(merged, inputs), wanted, atol=1e-5)
    merged.save_pretrained(tmp_path)
    again, loading = AutoModelForImageTextToText.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(loading.values())
    assert_equal(logits(again, inputs), logits(merged, inputs))


# Several adapters


@ROUTER_WAYS
def test_adapters_are_switched_and_switched_off(way, model, base, inputs):
    tuned = wrap(model, seed=1, **way)
    first = logits(tuned, inputs)
    tuned.add_adapter("second", LoraConfig(r=4, target_modules=QUERIES, **way))
    redraw(tuned, "second", 2)
    tuned.set_adapter("second")
    second = logits(tuned, inputs)
    assert (first - second).abs().max() > 1e-2
    tuned.set_adapter("default")
    assert_equal(logits(tuned, inputs), first)
    with tuned.disable_adapter():
        assert_equal(logits(tuned, inputs), logits(reload(base), inputs))
    tuned.delete_adapter("default")
    tuned.set_adapter("second")
    assert_equal(logits(tuned, inputs), second)


def test_an_adapter_is_swapped_in_place(model, base, inputs, tmp_path):
    """PEFT swaps weights of adapters only, so routers are adapted, not trained whole."""
    other = wrap(reload(base), seed=2, **ADAPTED)
    other.save_pretrained(tmp_path)
    tuned = wrap(model, seed=1, **ADAPTED)
    identity = {name: id(value) for name, value in tuned.named_parameters()}
    hotswap_adapter(tuned, tmp_path, adapter_name="default")
    assert_equal(logits(tuned, inputs), logits(other, inputs))
    assert identity == {name: id(value) for name, value in tuned.named_parameters()}


# What PEFT cannot do, said early


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"use_dora": True}, r"use_dora is True, but LoRA on experts \(here: text\) takes False only in PEFT"),
        ({"lora_bias": True}, "lora_bias is True, but LoRA on experts"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa', .* takes True or False or 'gaussian' only"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights is 'pissa_niter_4', but LoRA on experts"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out is True"),
        ({"lora_dropout": 0.1}, "lora_dropout is 0.1, but LoRA on experts .* has no dropout in PEFT"),
        ({"lora_targets": ["all-linear"]}, "all-linear finds Linears only: it would miss the experts"),
        (
            {"lora_targets": "experts"},
            "lora_targets is 'experts'; expected some of attention, experts, mlp, as a list",
        ),
        ({"lora_parts": ["txt"]}, "Did you mean 'text' for 'txt'"),
        ({"r": 4}, "r of LoraConfig is worked out from lora_r; give those"),
        ({"target_modules": "all-linear"}, "target_modules of LoraConfig is worked out from lora_parts and lora_targ"),
        ({"use_rlora": True}, "use_rlora is neither a setting nor a field .* Did you mean 'use_rslora'"),
    ],
)
def test_raises_when_peft_cannot_do_it_on_experts(model, given, message):
    with pytest.raises(ValueError, match=message):
        lora_config(model, **given)


def test_what_experts_cannot_have_attention_can(model, inputs):
    config = lora_config(model, lora_targets=["attention"], use_dora=True, lora_dropout=0.1, lora_r=2)
    tuned = get_peft_model(model, config)
    tuned(**inputs, labels=inputs["input_ids"]).loss.backward()
    assert all(value.grad is not None for value in tuned.parameters() if value.requires_grad)


def test_a_recipe_with_all_linear_says_why_not():
    needed = ["model=m", "data=d.jsonl", "output_dir=o"]
    with pytest.raises(ValueError, match=r"lora_targets is \['all-linear'\].*miss the experts, .* and the routers"):
        parse_recipe("lora", [*needed, "lora_targets=all-linear"])


def test_raises_when_the_name_is_of_another_architecture(tmp_path):
    tiny.text_model("llama").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is a llama model; expected a vlmoe one"):
        lora_config(tmp_path)


# Who wraps the model without us is told what cannot be meant


@pytest.fixture
def warnings(caplog):
    """What the model says of the adapter around it."""

    def said():
        return [record.getMessage() for record in caplog.records if record.name.endswith("adapter_warnings")]

    with caplog.at_level(logging.WARNING):
        yield said


def step(model, inputs):
    model.train()(**inputs, labels=inputs["input_ids"]).loss.backward()


def test_all_linear_is_warned_of_once_at_the_first_training_pass(model, inputs, warnings):
    tuned = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear"))
    logits(tuned, inputs)
    assert not warnings()
    step(tuned, inputs)
    step(tuned, inputs)
    (message,) = warnings()
    stacks = ["mlp.experts.down_proj", "mlp.experts.gate_up_proj", "mlp.experts.up_proj"]
    assert f"target_parameters={stacks} and modules_to_save=['router']" in message
    idle = sum(
        value.numel()
        for name, value in tuned.named_parameters()
        if value.requires_grad and value.grad is None  # the ViT's last layer and its pooling head
    )
    assert idle > 0
    assert f" {idle} of its weights adapt what the connector never reads" in message


def test_what_the_warning_advises_trains_the_experts(model, inputs, warnings):
    names = ["mlp.experts.down_proj", "mlp.experts.gate_up_proj", "mlp.experts.up_proj"]
    advised = {"target_parameters": names, "modules_to_save": ["router"], "exclude_modules": r".*vision_tower.*"}
    tuned = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear", **advised))
    step(tuned, inputs)
    assert not warnings()
    assert trained(tuned) >= EXPERTS | ROUTERS
    assert all(value.grad is not None for value in tuned.parameters() if value.requires_grad)


@pytest.mark.parametrize("fields", [WHOLE, {"modules_to_save": ["router"]}, {"target_parameters": STACKS}])
def test_no_warning_where_experts_or_routers_are_trained(model, inputs, warnings, fields):
    step(wrap(model, **fields), inputs)
    assert not warnings()


def test_a_connector_that_is_trained_whole_and_adapted_too_is_warned_of(model, base, inputs, warnings, tmp_path):
    """PEFT saves such an adapter and does not load it: when it does, the warning has had its day."""
    tuned = wrap(model, target_parameters=STACKS, modules_to_save=["router", "connector"])
    step(tuned, inputs)
    (message,) = warnings()
    assert "trains connector whole and adapts it too" in message
    tuned.save_pretrained(tmp_path)
    with pytest.raises(KeyError, match=r"connector\.mlp\.experts"):
        PeftModel.from_pretrained(reload(base), tmp_path)
    named = get_peft_model(reload(base), lora_config(base, lora_parts=["text", "vision"], train_connector=True))
    step(named, inputs)
    assert len(warnings()) == 1
    named.save_pretrained(tmp_path / "named")
    assert_equal(logits(PeftModel.from_pretrained(reload(base), tmp_path / "named"), inputs), logits(named, inputs))


def test_no_warning_for_a_dense_model_or_without_an_adapter(dense_base, model, inputs, warnings):
    step(get_peft_model(reload(dense_base), LoraConfig(r=2, target_modules="all-linear")), inputs)
    model.requires_grad_(False)
    model.lm_head.requires_grad_(True)
    step(model, inputs)
    assert not warnings()


def test_no_warning_where_a_recipe_says_attention_alone(model, inputs, arguments, warnings):
    given = {"lora_targets": ["attention"], "train_routers": False}
    args: FinetuneArguments = arguments(**given)
    step(prepare_model(model, args), inputs)
    assert not warnings()


def test_the_warning_waits_while_the_model_is_compiled(model, inputs, warnings):
    tuned = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear")).train()
    make_context = torch.compile(model.model.router_context, backend="eager", fullgraph=True)
    assert make_context(inputs["attention_mask"], has_loss=True) is not None
    assert not warnings()
    step(tuned, inputs)
    assert len(warnings()) == 1


def test_transposed_linears_and_experts_are_adapted_apart():
    config = VLMoEConfig(
        text_config=tiny_config("gpt2", "text"),
        vision_config=tiny_config("siglip_vision_model", "vision"),
        text_moe={"num_experts": 4},
    )
    made = VLMoEForConditionalGeneration(config)
    with pytest.raises(ValueError, match=r"c_attn is a Conv1D, .* Choose lora_targets=\[\"experts\"\] or"):
        lora_config(made)
    for targets in (["experts"], ["attention"]):
        get_peft_model(copy.deepcopy(made), lora_config(made, lora_targets=targets))
