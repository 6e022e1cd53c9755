"""Names and patterns train what they name, whole and nothing else; what finds nothing or stays frozen is an error."""

import re

import pytest
from peft import PeftModel

from modeling_vlmoe.finetune import prepare_model
from modeling_vlmoe.finetune.arguments import parse_settings
from modeling_vlmoe.finetune.settings import FinetuneSettings
from modeling_vlmoe.finetune.trained.cells import parameter_cells
from modeling_vlmoe.finetune.trained.checks import learns_from_images_alone
from modeling_vlmoe.finetune.trained.counts import count_cells, table
from modeling_vlmoe.finetune.trained.names import PRESETS
from modeling_vlmoe.quantization import quantize_experts
from tests import models
from tests.finetune.conftest import DENSE

DELTA = {part: models.EXPERTS | {"expert_type": "delta", "expert_rank": 2} for part in DENSE}
# The ViT's weights behind the layer that the connector reads.
IDLE = ("vision_tower.encoder.layers.3.", "vision_tower.post_layernorm.", "vision_tower.head.")


def trained(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def full(train, **fields):
    model = models.sparse_model(**fields)
    return prepare_model(model, FinetuneSettings(method="full", train=train))


# What is trained, and what a name of a parameter then has.
TRAINS = {
    "connector": lambda name: "model.connector." in name,
    "vision": lambda name: "model.vision_tower." in name,
    "experts": lambda name: "language_model." in name and ".experts." in name,
    "vision.routers,routers": lambda name: ".router." in name and "connector" not in name,
    "moe-layers": lambda name: ".experts." in name or ".router." in name,
    "llm": lambda name: "language_model." in name or "lm_head." in name,
    "all-but-vision": lambda name: "vision_tower." not in name,
    "all": lambda name: True,
    "": lambda name: True,
    "head,embeddings": lambda name: "lm_head." in name or "embed_tokens." in name,
    "model.language_model.*.q_proj.*,norms": lambda name: "language_model." in name and re.search("q_proj|norm", name),
    "model.language_model.layers.1.*": lambda name: "language_model.layers.1." in name,
}


@pytest.mark.parametrize("train", TRAINS)
def test_what_is_named_is_trained_and_nothing_else(train):
    model = full(train.split(",") if train else [])
    wanted = {name for name, _ in model.named_parameters() if TRAINS[train](name)}
    assert trained(model) == {name for name in wanted if not any(idle in name for idle in IDLE)}
    assert wanted


def test_every_preset_trains_something_on_sparse_and_dense_models():
    for preset in PRESETS:
        assert trained(full([preset]))
        if preset != "moe-layers":
            assert trained(full([preset], **DENSE))


def test_a_kept_base_stays_frozen_under_its_parts_name_and_is_refused_by_pattern():
    kept = {part: moe | {"train_expert_base": False} for part, moe in DELTA.items()}
    found = trained(full(["experts"], **kept))
    assert found
    assert all(".deltas." in name for name in found)
    assert trained(full(["experts"], **DELTA)) > found
    with pytest.raises(ValueError, match="would stay frozen: the model's configuration keeps the base of its delta"):
        full(["model.language_model.layers.*.mlp.experts.*"], **kept)


@pytest.mark.parametrize(
    ("train", "fields", "message"),
    [
        (["experts"], DENSE, "train names the part experts, but the model has nothing of it; it has .*mlp"),
        (["moe-layers"], DENSE, "train names the preset moe-layers, but the model has nothing of it"),
        (["mlp"], {}, "train names the part mlp, but the model has nothing of it"),
        (
            ["vision.head"],
            {},
            "part vision.head, of which nothing can be trained: .*head.probe stays frozen, since no",
        ),
        (["model.vision_tower.*"], {}, "layers.3.layer_norm1.bias and 28 others would stay frozen: no gradient"),
        (["model.vision_tower.encoder.layers.3.*"], {}, "would stay frozen: no gradient reaches it.*Narrow"),
        (["model.language_model.layers.9.*"], {}, "matches no parameter; give names as the model has them"),
        (["model.connector"], {}, r"matches no parameter.* Did you mean 'model.connector.\*'"),
        (["lm_head.weigth"], {}, "Did you mean 'lm_head.weight'"),
    ],
    ids=lambda given: "+".join(given)[:30],
)
def test_raises_when_a_word_finds_nothing_or_what_stays_frozen(train, fields, message):
    with pytest.raises(ValueError, match=message):
        full(train, **fields)


def test_raises_when_a_tied_weight_is_named():
    tied = {"tie_word_embeddings": True}
    model = models.sparse_model(**tied)
    model.config.text_config.tie_word_embeddings = True
    model.lm_head.weight = model.get_input_embeddings().weight
    for train, message in (
        (["head"], r"lm_head.weight is tied to .*embed_tokens.weight: name embeddings"),
        (["lm_head.*"], r"lm_head.weight is tied to .*embed_tokens.weight: name that one"),
    ):
        with pytest.raises(ValueError, match=message):
            prepare_model(model, FinetuneSettings(method="full", train=train))
    prepare_model(model, FinetuneSettings(method="full", train=["embeddings"]))
    assert trained(model) == {"model.language_model.embed_tokens.weight"}
    with pytest.raises(ValueError, match="shares, and beside LoRA a copy would be trained in one place"):
        prepare_model(model, FinetuneSettings(method="lora", train=["embeddings"]))


def test_raises_when_packed_weights_are_named():
    model = quantize_experts(models.sparse_model(), 8)
    with pytest.raises(ValueError, match=r"part experts, of which nothing can be trained: .*it is packed"):
        prepare_model(model, FinetuneSettings(method="full", train=["experts"]))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"train": "rooters"}, "train has 'rooters'; expected names of parts .* Did you mean 'routers'"),
        ({"train": "connector", "method": "align"}, "method align says itself what is trained; leave train out"),
        ({"train": "connector", "method": "delta"}, "method delta says itself what is trained"),
        ({"method": "fulll"}, "method is 'fulll'; expected one of align, lora, delta, full. Did you mean 'full'"),
    ],
    ids=str,
)
def test_raises_when_a_word_is_unknown_before_anything_is_loaded(given, message):
    with pytest.raises(ValueError, match=message):
        parse_settings({"model": "m", "data": "d", "output_dir": "o", "report_to": "none", "method": "full"} | given)


# Beside LoRA


@pytest.mark.parametrize(
    ("train", "targets"),
    [(["norms", "head"], ["attention", "experts"]), (["connector"], ["experts"]), (["experts"], ["attention"])],
    ids=str,
)
def test_lora_trains_whole_what_is_named(train, targets):
    bare = models.sparse_model()
    cells = parameter_cells(bare)
    model = prepare_model(bare, FinetuneSettings(train=train, lora_targets=targets, lora_r=2))
    assert isinstance(model, PeftModel)
    counts = count_cells(model, cells)
    for word in train:
        of_word = [cell for cell in counts if cell == word or cell.startswith(f"{word}.")]
        assert of_word
        assert all(counts[cell][0] == counts[cell][1] for cell in of_word)
    assert counts["routers"][0] == counts["routers"][1]
    assert counts["attention"][0] == (0 if targets == ["experts"] else counts["attention"][0]) < counts["attention"][1]
    assert counts["vision.mlp"][0] == 0


def test_raises_when_lora_is_on_what_is_named():
    for train in (["attention"], ["experts"], ["model.language_model.layers.0.self_attn.q_proj.weight"]):
        with pytest.raises(ValueError, match=r"which gets LoRA. Take what it is of out of lora_targets or lora_parts"):
            prepare_model(models.sparse_model(), FinetuneSettings(train=train))


def test_raises_when_peft_would_train_more_than_is_named():
    train = ["model.connector.mlp.experts.down_proj"]
    with pytest.raises(ValueError, match=r"PEFT trains whole modules, so .*up_proj.* too. Name that as well"):
        prepare_model(models.sparse_model(), FinetuneSettings(train=train))


# Counts


def test_counts_are_those_of_the_parameters_and_add_up():
    model = full(["routers", "connector"])
    counts = count_cells(model, parameter_cells(model))
    parameters = dict(model.named_parameters())
    assert sum(own for _, own in counts.values()) == sum(one.numel() for one in parameters.values())
    assert sum(learnt for learnt, _ in counts.values()) == sum(parameters[name].numel() for name in trained(model))
    assert counts["routers"] == [3 * 4 * 32] * 2
    assert counts["vision.attention"][0] == 0
    said = table(counts).splitlines()
    assert said[0] == "Trained, by part:"
    assert any(line.split() == ["routers", "384", "of", "384"] for line in said)
    assert said[-1].split()[0] == "all"


@pytest.mark.parametrize(
    ("train", "is_alone"),
    [
        (["vision", "connector"], True),
        (["vision.experts"], True),
        (["model.connector.*"], True),
        (["connector", "norms"], False),
        (["model.*"], False),
        ([], False),
    ],
    ids=str,
)
def test_rows_without_images_are_refused_where_only_images_teach(train, is_alone):
    assert learns_from_images_alone(FinetuneSettings(method="full", train=train)) == is_alone
