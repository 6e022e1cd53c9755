"""What the Transformers backends of vLLM and SGLang ask of a model, item by item, without either installed.

The list is vLLM's documentation ("Supported models", *Custom models* and *Writing custom models*) and what the two
backends read (vllm/model_executor/models/transformers, sglang/srt/models/transformers.py, November 2026). What vlmoe
does not meet is at the end, and in docs/serving.md.
"""

import copy
import inspect
import json
import subprocess
import sys
from importlib.metadata import entry_points

import pytest
import torch
import transformers
from torch import nn
from transformers import AutoModel, AutoProcessor
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from modeling_vlmoe import VLMoEModel
from modeling_vlmoe.servers import register_with_servers
from modeling_vlmoe.sparse_moe import Experts
from modeling_vlmoe.text_head import HEAD_MATHS
from modeling_vlmoe.towers import sparse_blocks
from tests import native_llava, tiny
from tests.models import ALL_SPARSE, EXPERTS, batch, gap, pixels, sparse_config, sparse_model

# The styles of Linears that both servers take; both read the plan for Linears only, and replicate those it leaves out.
STYLES = {"colwise", "rowwise"}
# What both backends read from the text configuration's head: anything else is not repeated.
SERVED_HEAD_MATHS = {"final_logit_softcapping", "logit_scale"}
SERVED = {"vision_moe": None, "connector_moe": None}


def register_spy(monkeypatch, name: str = "served") -> list[tuple[int, dict]]:
    """An attention that notes its layer and keywords, and computes what sdpa does."""
    seen = []

    def attention(module, query, key, value, attention_mask, **kwargs):
        seen.append((module.layer_idx, kwargs))
        kwargs.pop("attention_instances")
        return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, attention_mask, **kwargs)

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, name, attention)
    return seen


@pytest.fixture(scope="module")
def model():
    return sparse_model(**SERVED)


# The class


def test_the_folder_names_a_class_that_is_backend_compatible(vlmoe_folder):
    """`config.json` contains `auto_map.AutoModel`, and the class that it names says so."""
    named = json.loads((vlmoe_folder / "config.json").read_text())["auto_map"]["AutoModel"]
    remote = get_class_from_dynamic_module(named, vlmoe_folder)
    for model_class in (remote, VLMoEModel):
        assert model_class._supports_attention_backend is True
        assert model_class.is_backend_compatible()
    assert issubclass(remote, transformers.PreTrainedModel)
    assert remote is not VLMoEModel


def test_the_plugin_makes_the_class_known_in_a_fresh_process():
    """vLLM and SGLang look for the architecture in `transformers`; the entry point puts it there, once and again."""
    (plugin,) = [one for one in entry_points(group="vllm.general_plugins") if one.name == "vlmoe"]
    assert plugin.load() is register_with_servers
    code = (
        "from importlib.metadata import entry_points\n"
        "import transformers  # as a server that imports it first; the host loads itself anew later\n"
        "for _ in range(2):\n"
        "    [one] = [one for one in entry_points(group='vllm.general_plugins') if one.name == 'vlmoe']\n"
        "    one.load()()\n"
        "print(transformers.VLMoEForConditionalGeneration.is_backend_compatible(), "
        "transformers.AutoConfig.for_model('vlmoe').model_type)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.split() == ["True", "vlmoe"], done.stderr


def test_it_is_seen_as_a_multimodal_mixture_of_experts(model):
    config = model.config
    text = config.get_text_config()
    assert text is not config
    assert text == config.text_config
    assert (text.num_experts, text.num_experts_per_tok) == (EXPERTS["num_experts"], EXPERTS["num_experts_per_tok"])
    assert text.moe_intermediate_size == tiny.TEXT_FIELDS["intermediate_size"]
    assert text.norm_topk_prob is True


def test_the_same_names_are_in_the_file(vlmoe_folder):
    text = json.loads((vlmoe_folder / "config.json").read_text())["text_config"]
    assert {"num_experts", "num_experts_per_tok", "moe_intermediate_size", "norm_topk_prob"} <= set(text)


# The base model, as vLLM builds and calls it


@torch.no_grad()
def test_attention_goes_through_the_hosts_table_with_its_keywords(model, monkeypatch):
    """Built by `AutoModel.from_config` with another attention, called with vLLM's keywords, in one row of tokens."""
    seen = register_spy(monkeypatch)
    config = copy.deepcopy(model.config)
    config.text_config._attn_implementation = "served"
    with torch.device("meta"):
        body = AutoModel.from_config(config, dtype=torch.float32)
    body.load_state_dict(model.model.state_dict(), assign=True)
    for name, buffer in model.model.named_buffers():
        owner, _, last = name.rpartition(".")
        setattr(body.get_submodule(owner), last, buffer)
    body.eval()
    assert type(body) is VLMoEModel
    ids = batch((0,))["input_ids"]
    embeds = body.get_input_embeddings()(ids)
    instances = {index: object() for index in range(tiny.TEXT_FIELDS["num_hidden_layers"])}
    outputs = body(
        input_ids=None,
        inputs_embeds=embeds,
        use_cache=False,
        position_ids=torch.arange(ids.shape[1])[None],
        attention_instances=instances,
        return_dict=False,
    )
    assert [index for index, _ in seen] == list(instances)
    torch.testing.assert_close(outputs[0], model.model(input_ids=ids).last_hidden_state)


@torch.no_grad()
def test_every_attention_is_handed_the_servers_keywords(model, monkeypatch):
    given = []
    sdpa = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def attention(module, *args, **kwargs):
        given.append((type(module).__name__, kwargs.pop("attention_instances", None)))
        return sdpa(module, *args, **kwargs)

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "sdpa", attention)
    model.model(**batch((1,)), attention_instances="these")
    assert [instances for name, instances in given if name.startswith("Llama")] == ["these"] * 3


def test_decoder_encoder_and_embeddings_are_found(model):
    body = model.model
    assert body.get_decoder() is body.language_model
    assert body.get_encoder(modality="image") is body.vision_tower
    assert body.get_input_embeddings() is body.language_model.embed_tokens
    assert body.base_model_prefix == "model"
    assert {name.partition(".")[0] for name in model.state_dict()} == {"model", "lm_head"}
    assert isinstance(body.language_model.layers, nn.ModuleList)
    assert len(body.language_model.layers) == body.config.text_config.num_hidden_layers


def test_nothing_but_the_head_is_outside_the_base_model(model):
    """Customisation is done in the base model; what the head adds is read from the text configuration."""
    assert {name for name, _ in model.named_children()} == {"model", "lm_head"}
    assert set(HEAD_MATHS) >= SERVED_HEAD_MATHS


def test_the_plan_has_only_styles_that_servers_take(model):
    plan = {name.replace("*", "0"): style for name, style in model.model.tp_plan.items()}
    linears = {name for name, child in model.model.named_modules() if isinstance(child, nn.Linear)}
    planned = {name: style for name, style in plan.items() if name in linears}
    assert set(planned.values()) == STYLES
    assert {f"language_model.layers.0.self_attn.{name}_proj" for name in "qkvo"} <= set(planned)


# The sparse block


def test_the_block_is_written_as_servers_expect(model):
    blocks = sparse_blocks(model.model)
    assert len(blocks) == tiny.TEXT_FIELDS["num_hidden_layers"]
    for _, block in blocks:
        experts = block.experts
        assert isinstance(experts, Experts)
        assert all(tensor.ndim == 3 for tensor in experts.parameters())  # "or contain all 3D parameters"
        assert {name for name, _ in experts.named_parameters()} == {"gate_up_proj", "down_proj"}
        names = list(inspect.signature(type(experts).forward).parameters)
        assert names[:4] == ["self", "hidden_states", "top_k_index", "top_k_weights"]
        assert not [name for name, _ in block.named_parameters() if "shared_expert" in name]
        # A router of one weight, (experts, width), without a bias.
        assert [(name, tensor.ndim) for name, tensor in block.router.named_parameters()] == [("weight", 2)]


@torch.no_grad()
def test_experts_may_be_exchanged_for_the_servers_own(model):
    """What vLLM does: another module in the place of `experts`, called with the three tensors by position."""
    calls = []

    class Fused(nn.Module):
        def __init__(self, experts):
            super().__init__()
            self.inner = [experts]

        def forward(self, hidden_states, topk_ids, topk_weights, **kwargs):
            calls.append((hidden_states.shape, topk_ids.to(torch.int32).shape, topk_weights.dtype))
            return self.inner[0](hidden_states, topk_ids, topk_weights)

    inputs = batch((1,))
    wanted = model(**inputs).logits
    exchanged = sparse_model(**SERVED)
    for _, block in sparse_blocks(exchanged.model):
        block.experts = Fused(block.experts)
    assert gap(exchanged(**inputs).logits, wanted) <= 1e-6
    tokens = inputs["input_ids"].shape[1]
    assert calls == [((tokens, 32), (tokens, 2), torch.float32)] * 3


# Images


@torch.no_grad()
def test_image_features_are_one_tensor_per_image(model):
    """vLLM takes `pooler_output`, and a list of one (tokens, width) tensor per image as it is."""
    body = model.model
    features = body.get_image_features(pixels(3), return_dict=True).pooler_output
    assert [tuple(one.shape) for one in features] == [(tiny.NUM_PATCHES, 32)] * 3
    alone = torch.cat([body.get_image_features(pixels(3)[[index]]).pooler_output[0] for index in range(3)])
    torch.testing.assert_close(torch.cat(features), alone)


def test_the_processor_counts_tokens_and_reports_where_they_went(vlmoe_folder):
    from PIL import Image

    processor = AutoProcessor.from_pretrained(vlmoe_folder)
    images = [Image.new("RGB", size) for size in ((24, 24), (100, 30), (10_000, 10))]
    sizes = [(image.height, image.width) for image in images]
    counts = processor._get_num_multimodal_tokens(image_sizes=sizes)
    assert counts["num_image_patches"] == [1, 1, 1]
    token = processor.image_token
    text = f"a {token} b {token}{token}"
    inputs = processor(text=text, images=images, return_text_replacement_offsets=True, return_tensors="pt")
    (offsets,) = inputs["text_replacement_offsets"]
    assert [entry["type"] for entry in offsets] == ["image"] * 3
    encoded = [processor.tokenizer(entry["replacement"], add_special_tokens=False)["input_ids"] for entry in offsets]
    assert [len(ids) for ids in encoded] == counts["num_image_tokens"]
    assert {id for ids in encoded for id in ids} == {processor.image_token_id}
    assert inputs["pixel_values"].shape[0] == sum(counts["num_image_patches"])
    assert processor.tokenizer(processor.image_token, add_special_tokens=False)["input_ids"] == [
        processor.image_token_id
    ]


def test_the_processor_takes_what_vllm_sends(vlmoe_folder):
    processor = AutoProcessor.from_pretrained(vlmoe_folder)
    assert hasattr(processor, "image_processor")
    assert "pixel_values" in processor.image_processor.model_input_names
    assert processor.image_token_id == native_llava.vlmoe_model().config.image_token_id
    inputs = processor(text="no picture", return_tensors="pt", truncation=False, add_special_tokens=False)
    assert "pixel_values" not in inputs


# What is not met: docs/serving.md says so


def test_a_sparse_vit_or_connector_is_of_other_sizes_than_servers_build():
    """They build every module called `experts` with the LLM's sizes, SiLU and, as vlmoe writes it, a gate."""
    body = sparse_model(**ALL_SPARSE).model
    text = {block.experts.gate_up_proj.shape for path, block in sparse_blocks(body) if path.startswith("language")}
    assert len(text) == 1
    others = [block.experts for path, block in sparse_blocks(body) if not path.startswith("language")]
    assert others
    assert not any(hasattr(experts, "gate_up_proj") for experts in others)


def test_heads_that_servers_do_not_repeat_are_known():
    unserved = {"logits_scaling", "lm_head_multiplier", "logits_soft_cap", "output_logit_soft_cap"}
    assert set(HEAD_MATHS) - SERVED_HEAD_MATHS == unserved


def test_the_activation_that_servers_assume_is_the_models():
    config = sparse_config(**SERVED)
    assert config.text_config.hidden_act == "silu"
