"""A host's VLM that is sparse in place is a model of ours: outputs, losses, kernels, saving, code for strangers."""

import copy
import json
import pickle

import pytest
import torch
from torch.utils._pytree import tree_flatten, tree_unflatten
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoModelForSequenceClassification,
    Qwen2_5_VLForConditionalGeneration,
    Trainer,
    TrainingArguments,
    pipeline,
)

from modeling_vlmoe import VLMoEConfig, VLMoEForConditionalGeneration, VLMoEModel
from modeling_vlmoe.parts import find_connector, find_towers
from modeling_vlmoe.sparse_moe import SparseMoE
from tests import hosts, tiny
from tests.conformance.oracle import MicroBatch, losses_of
from tests.models import gap

FAMILIES = ["qwen2_5_vl", "smolvlm", "llava_next"]
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2}


def config(family, **fields):
    parts = {"text_moe": dict(EXPERTS), "vision_moe": dict(EXPERTS)}
    parts |= {"connector_moe": dict(EXPERTS)} if hosts.HOSTS[family].has_connector else {}
    return VLMoEConfig.from_dict(hosts.config(family).to_dict() | {"body_model_type": family} | parts | fields)


def model(family, **fields):
    """Unlike experts, every parameter redrawn."""
    return tiny.redraw(AutoModelForImageTextToText.from_config(config(family, **fields))).eval()


def given(family, num_images=(1, 2)):
    return hosts.inputs(hosts.processor(family), family, num_images)


def has_connector(family):
    return hosts.HOSTS[family].has_connector


PLACES = {
    "qwen2_5_vl": ("model.language_model", "model.visual", "model.visual.merger.mlp"),
    "llava_next": ("model.language_model", "model.vision_tower", "model.multi_modal_projector"),
    "internvl": ("model.language_model", "model.vision_tower", "model.multi_modal_projector.linear_1"),
    "qwen3_vl": ("model.language_model", "model.visual", "model.visual.merger.linear_fc1"),
    "idefics3": ("model.text_model", "model.vision_model", None),
    "paligemma": ("model.language_model", "model.vision_tower", None),
}


@pytest.mark.parametrize("family", PLACES)
def test_parts_are_found_by_structure(family):
    dense = hosts.model(family)
    text, vision, connector = PLACES[family]
    assert {part: path for part, (path, _) in find_towers(dense).items()} == {"text": text, "vision": vision}
    if connector is None:
        with pytest.raises(ValueError, match="no MLPs of a known layout"):
            find_connector(dense)
    else:
        assert find_connector(dense).path == connector


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_router_logits_come_with_the_hosts_outputs(family):
    made, inputs = model(family), given(family)
    plain, routed = made(**inputs), made(**inputs, output_router_logits=True)
    assert torch.equal(plain.logits, routed.logits)
    assert "router_logits" not in plain
    assert isinstance(routed, type(plain))
    num_tokens = inputs["input_ids"].numel()
    assert [tuple(one.shape) for one in routed.router_logits] == [(num_tokens, 4)] * 3
    assert len(routed.vision_router_logits) == 2
    assert (routed.connector_router_logits is not None) == has_connector(family)
    assert routed.router_losses is None  # not in training
    made.config.get_text_config().output_router_logits = True
    assert len(made(**inputs).router_logits) == 3
    assert len(made.model(**inputs).router_logits) == 3  # as TRL calls it


def gradients(made, inputs, weights):
    """The routers' gradients of a training pass, with these (balance, z) weights."""
    for part in ("text", "vision", "connector"):
        if (moe := made.config.moe(part)) is not None:
            moe.router_aux_loss_coef, moe.router_z_loss_coef = weights
    made.zero_grad()
    outputs = made(**inputs, labels=inputs["input_ids"])
    outputs.loss.backward()
    return outputs, {name: one.grad for name, one in made.named_parameters() if ".router." in name}


@pytest.mark.parametrize("is_checkpointed", [False, True], ids=["plain", "checkpointed"])
@pytest.mark.parametrize("family", FAMILIES)
def test_router_losses_reach_the_routers(family, is_checkpointed):
    """What the losses add to the task's gradient is the plain loops' gradient."""
    made, inputs, weights = model(family).train(), given(family), (0.3, 0.02)
    if is_checkpointed:
        if family == "smolvlm":  # its ViT gives its layers no keywords
            made = model(family, vision_moe=None).train()
        made.activation_checkpointing_enable()
    _, task = gradients(made, inputs, (0.0, 0.0))
    outputs, both = gradients(made, inputs, weights)
    made.zero_grad()
    made.eval()  # nothing is attached there
    wanted = losses_of(made.model, MicroBatch(inputs), weights)
    wanted.backward()
    assert outputs.aux_loss.item() == pytest.approx(wanted.item(), rel=1e-4)
    assert set(outputs.router_losses) == {part for part in ("text", "vision", "connector") if made.config.moe(part)}
    for name, gradient in both.items():
        auxiliary = made.get_parameter(name).grad
        assert auxiliary.abs().max() > 0
        assert task[name].abs().max() > 0
        torch.testing.assert_close(gradient - task[name], auxiliary, atol=2e-5, rtol=2e-3)


def test_a_vit_that_hands_no_keywords_on_is_refused_under_checkpointing():
    made, inputs = model("smolvlm").train(), given("smolvlm")
    made.activation_checkpointing_enable()
    with pytest.raises(ValueError, match="would be lost when gradient checkpointing runs it again"):
        made(**inputs, labels=inputs["input_ids"])


@pytest.mark.parametrize("family", FAMILIES)
def test_every_weight_learns(family):
    made, inputs = model(family).train(), given(family)
    made(**inputs, labels=inputs["input_ids"]).loss.backward()
    idle = [name for name, one in made.named_parameters() if one.grad is None]
    behind = ("vision_tower.encoder.layers.3", "post_layernorm", "layers.3.", "head", "image_newline")
    assert all(any(piece in name for piece in behind) for name in idle), idle


# Configured so, the dense Qwen2.5-VL itself fails.
@pytest.mark.parametrize(("family", "is_configured"), [*((family, False) for family in FAMILIES), ("smolvlm", True)])
def test_tuples_hold_what_the_outputs_hold(family, is_configured):
    """And router losses follow the loss in them, scaled as it is."""
    made, inputs = model(family).train(), given(family)
    asked = inputs | {"labels": inputs["input_ids"], "output_router_logits": True}
    wanted = made(**asked)
    (0.01 * wanted.loss).backward()
    routers = [one for name, one in made.named_parameters() if ".router." in name]
    gradients = [one.grad for one in routers]
    made.zero_grad()
    made.config.return_dict = not is_configured
    found = made(**asked) if is_configured else made(**asked, return_dict=False)
    (0.01 * found[0]).backward()
    assert type(found) is tuple
    assert len(found) == len(wanted.to_tuple())
    for one, gradient in zip(routers, gradients, strict=True):
        torch.testing.assert_close(one.grad, gradient)


@pytest.mark.parametrize("family", FAMILIES)
def test_outputs_can_be_taken_apart_and_put_together(family):
    """As DDP does, with what is inside them too (the features of the images)."""
    outputs = model(family).train()(**(inputs := given(family)), labels=inputs["input_ids"], output_router_logits=True)
    leaves, shape = tree_flatten(outputs)
    again = tree_unflatten(leaves, shape)
    assert again.keys() == outputs.keys()
    assert again.aux_loss is outputs.aux_loss


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_kernels_are_switched_for_every_part(family):
    made, inputs = model(family), given(family)
    wanted = made(**inputs).logits
    for name in ("eager", "batched_mm", "grouped_mm"):
        made.set_experts_implementation(name)
        blocks = [one for one in made.modules() if isinstance(one, SparseMoE)]
        assert {block.experts.config._experts_implementation for block in blocks} == {name}
        assert gap(made(**inputs).logits, wanted) <= 1e-5


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_a_saved_model_comes_back(family, tmp_path):
    made, inputs = model(family), given(family)
    made.save_pretrained(tmp_path / "one", max_shard_size="100KB")
    again = AutoModelForImageTextToText.from_pretrained(tmp_path / "one").eval()
    assert type(again) is type(made)
    assert all(torch.equal(again.get_parameter(name), value) for name, value in made.named_parameters())
    assert gap(again(**inputs).logits, made(**inputs).logits) <= 5e-6  # mapped weights lie otherwise in memory
    ours = VLMoEForConditionalGeneration.from_pretrained(tmp_path / "one", experts_implementation="eager").eval()
    assert type(ours) is type(made)
    assert ours.get_decoder().config._experts_implementation == "eager"
    again.save_pretrained(tmp_path / "two")
    assert json.loads((tmp_path / "two" / "config.json").read_text())["body_model_type"] == family
    for other in (pickle.loads(pickle.dumps(made)), copy.deepcopy(made)):
        assert gap(other(**inputs, output_router_logits=True).logits, made(**inputs).logits) <= 5e-6
        assert other.config.to_dict() == made.config.to_dict()


def test_auto_classes_give_the_hosts_own_kinds(tmp_path):
    model("qwen2_5_vl").save_pretrained(tmp_path)
    assert isinstance(AutoModelForMultimodalLM.from_pretrained(tmp_path), Qwen2_5_VLForConditionalGeneration)
    body = AutoModel.from_pretrained(tmp_path)
    assert type(body).__name__ == "SparseQwen2_5_VLModel"
    assert type(VLMoEModel.from_pretrained(tmp_path)) is type(body)
    with pytest.raises(ValueError, match="transformers has no such model for qwen2_5_vl"):
        AutoModelForSequenceClassification.from_pretrained(tmp_path)


def test_settings_are_checked_and_overridden_as_in_our_composite(tmp_path):
    made = config("qwen2_5_vl")
    made.save_pretrained(tmp_path)
    again = AutoConfig.from_pretrained(tmp_path, text_moe={"num_experts_per_tok": 1})
    assert (again.text_moe.num_experts, again.text_config.num_experts_per_tok) == (4, 1)
    assert "num_experts" not in json.loads((tmp_path / "config.json").read_text())["text_moe"]
    assert pickle.loads(pickle.dumps(made)).to_dict() == made.to_dict()
    for fields, message in (
        ({"text_moe": {"num_experts": 2, "num_experts_per_tok": 3}}, "num_experts_per_tok is 3"),
        ({"vision_moe": {"layers": [9]}}, "the vision tower has 4"),
        ({"text_moe": {"experts": 2}}, r"text_moe has unknown fields \['experts'\]"),
    ):
        with pytest.raises(ValueError, match=message):
            config("qwen2_5_vl", **fields)
    with pytest.raises(ValueError, match="body_model_type is 'no-such', which the installed transformers"):
        VLMoEConfig.from_dict({"body_model_type": "no-such"})
    for other in ("bert", "vlmoe"):
        with pytest.raises(ValueError, match=f"body_model_type is '{other}', which is no VLM of transformers"):
            VLMoEConfig.from_dict({"body_model_type": other})


def test_raises_when_a_tower_has_fewer_layers_than_its_configuration_says():
    made = config("qwen2_5_vl")
    made.vision_config.depth = 3
    made.vision_moe.layers = [2, 3]
    with pytest.raises(ValueError, match="the vision tower has 3"):
        AutoModelForImageTextToText.from_config(made)


STRANGER = """
import sys, torch
from transformers import AutoModelForImageTextToText, Qwen2_5_VLForConditionalGeneration
folder = {folder!r}
if {trusts}:
    model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True).eval()
    assert isinstance(model, Qwen2_5_VLForConditionalGeneration), type(model)
    inputs, wanted = torch.load(folder + "/inputs.pt")
    torch.testing.assert_close(model(**inputs).logits, wanted, atol=1e-5, rtol=1e-5)
    print(model.generate(**inputs, max_new_tokens=4, do_sample=False)[0, -4:].tolist())
    model.save_pretrained(folder + "/again")
    again = AutoModelForImageTextToText.from_pretrained(folder + "/again", trust_remote_code=True).eval()
    torch.testing.assert_close(again(**inputs).logits, wanted, atol=1e-5, rtol=1e-5)
else:
    AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=False)
"""


@torch.no_grad()
def test_a_stranger_without_the_package_loads_and_answers(tmp_path, run_python):
    made, inputs = model("qwen2_5_vl"), given("qwen2_5_vl", (1,))
    made.save_pretrained(tmp_path / "model")
    torch.save((inputs, made(**inputs).logits), tmp_path / "model" / "inputs.pt")
    wanted = made.generate(**inputs, max_new_tokens=4, do_sample=False)[0, -4:].tolist()
    code = STRANGER.format(folder=str(tmp_path / "model"), trusts=True)
    assert str(wanted) in run_python(code, without_package=True)
    refused = run_python(
        STRANGER.format(folder=str(tmp_path / "model"), trusts=False), without_package=True, fails=True
    )
    assert "trust_remote_code=True" in refused


@pytest.fixture(scope="module")
def llava_folder(tmp_path_factory):
    """A model and its processor, which needs no torchvision."""
    folder = tmp_path_factory.mktemp("llava_next")
    model("llava_next").save_pretrained(folder)
    hosts.processor("llava_next").save_pretrained(folder)
    return folder


def test_pipelines_know_the_class_and_answer(llava_folder, caplog):
    """By its folder, as an object, and as the causal LM that the Auto classes load it as too."""
    picture = hosts.picture(1)
    answers = pipeline("image-text-to-text", model=str(llava_folder), device="cpu")
    said = answers(images=picture, text="<image> what?", max_new_tokens=4)
    assert said[0]["generated_text"].startswith("<image> what?")
    given = pipeline("image-text-to-text", model=answers.model, processor=answers.processor)
    assert given(images=picture, text="<image> what?", max_new_tokens=4) == said
    pipeline("text-generation", model=answers.model, tokenizer=answers.tokenizer)
    assert not [one for one in caplog.messages if "is not supported" in one]


PIPED = """
import logging
from PIL import Image
from transformers import logging as host_logging, pipeline
said = []
handler = logging.Handler()
handler.emit = lambda record: said.append(record.getMessage())
host_logging.add_handler(handler)
for _ in range(2):  # the second load finds what the first has registered
    answers = pipeline("image-text-to-text", model={folder!r}, device="cpu", trust_remote_code=True)
    picture = Image.new("RGB", (48, 40))
    print(answers(images=picture, text="<image> what?", max_new_tokens=4)[0]["generated_text"])
assert said, "the host says something of chats, so the handler hears it"
assert not any("is not supported" in one for one in said), said
"""


def test_a_strangers_pipeline_answers_without_a_warning(llava_folder, run_python):
    said = run_python(PIPED.format(folder=str(llava_folder)), without_package=True)
    assert said.count("<image> what?") == 2


@torch.no_grad()
def test_labels_are_smoothed_where_the_hosts_are(tmp_path):
    """The Trainer shifts the labels of models whose class it knows by name: Gemma-3 is one."""
    made, inputs = model("gemma3"), given("gemma3", (1,))
    trainer = Trainer(made, TrainingArguments(tmp_path, use_cpu=True, report_to="none", label_smoothing_factor=0.1))
    labels = inputs["input_ids"]
    wanted = trainer.label_smoother(made(**inputs), labels, shift_labels=True)
    torch.testing.assert_close(trainer.compute_loss(made, dict(inputs) | {"labels": labels}), wanted)
