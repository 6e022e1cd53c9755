"""`device_map`: parts on the CPU, on disk, or wherever accelerate puts them give the same logits and tokens."""

import pytest
import torch
from transformers import AutoModelForImageTextToText

from tests import tiny
from tests.models import batch, gap, sparse_model

KEPT = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
PLACES = {
    "model.vision_tower": "disk",
    "model.connector": "cpu",
    "model.language_model.embed_tokens": "cpu",
    "model.language_model.layers.0": "cpu",
    "model.language_model.layers.1": "disk",
    "model.language_model.layers.2": "disk",
    "model.language_model.norm": "cpu",
    "model.language_model.rotary_emb": "cpu",
    "lm_head": "cpu",
}


@pytest.fixture(scope="module", params=tiny.VISION_FAMILIES)
def saved(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    model = sparse_model(vision=request.param)
    model.save_pretrained(folder, max_shard_size="100KB")
    return folder, model


@torch.no_grad()
@pytest.mark.parametrize(
    ("kwargs", "places"),
    [
        ({"device_map": "auto"}, set()),
        ({"device_map": "auto", "max_memory": {"cpu": 200_000}}, {"cpu", "disk"}),
        ({"device_map": "auto", "max_memory": {"cpu": 60_000}}, {"disk"}),
        ({"device_map": PLACES}, {"cpu", "disk"}),
        ({"device_map": "cpu"}, set()),
    ],
    ids=["auto", "auto, CPU and disk", "auto, nearly all on disk", "by hand", "CPU"],
)
def test_a_placed_model_computes_what_it_computed(saved, kwargs, places, tmp_path):
    folder, model = saved
    placed = AutoModelForImageTextToText.from_pretrained(folder, offload_folder=tmp_path, **kwargs)
    found = set(map(str, getattr(placed, "hf_device_map", {}).values()))
    assert places <= found
    is_off = [parameter.is_meta for parameter in placed.parameters()]
    assert any(is_off) == ("disk" in places)
    inputs = batch((1, 2))
    real = inputs["attention_mask"].bool()
    assert gap(placed(**inputs).logits[real], model(**inputs).logits[real]) <= 1e-6
    assert torch.equal(placed.generate(**inputs, **KEPT), model.generate(**inputs, **KEPT))


def test_layers_are_not_split_over_places(saved):
    """A sparse layer is placed as a whole, as the dense one was."""
    from accelerate import infer_auto_device_map

    _, model = saved
    largest = max(
        sum(tensor.numel() * tensor.element_size() for tensor in layer.parameters())
        for layer in model.model.language_model.layers
    )
    places = infer_auto_device_map(
        model, {"cpu": 2 * largest, "disk": 10**9}, no_split_module_classes=list(model._no_split_modules)
    )
    assert not [name for name in places if ".mlp" in name or ".self_attn" in name]
