"""What `from_pretrained` is told reaches the parts: precision, attention, experts' kernels, for one or for all."""

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

from tests.models import batch, gap, sparse_model


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    sparse_model().save_pretrained(folder)
    return folder


def load(folder, **kwargs):
    return AutoModelForImageTextToText.from_pretrained(folder, **kwargs)


def precisions(named):
    """Name and dtype of routers and of everything else."""
    routers = {tensor.dtype for name, tensor in named if ".router." in name}
    return routers, {tensor.dtype for name, tensor in named if ".router." not in name}


def test_bfloat16_keeps_routers_in_float32_also_in_the_file(saved, tmp_path):
    model = load(saved, dtype=torch.bfloat16)
    wanted = {torch.float32}, {torch.bfloat16}
    assert precisions(list(model.named_parameters())) == wanted
    model.save_pretrained(tmp_path)
    assert precisions(load_file(tmp_path / "model.safetensors").items()) == wanted
    for dtype in ("auto", None):  # None is "auto" since transformers 5
        again = load(tmp_path, **({} if dtype is None else {"dtype": dtype}))
        assert precisions(list(again.named_parameters())) == wanted
        assert again.dtype == torch.bfloat16
        for name, parameter in model.named_parameters():
            assert torch.equal(again.get_parameter(name), parameter), name


def test_auto_precision_of_a_float32_file_is_float32(saved):
    assert precisions(list(load(saved, dtype="auto").named_parameters())) == ({torch.float32}, {torch.float32})


def implementations(model, knob):
    body = model.model
    parts = {"": model.config, "text_config": body.language_model.config, "vision_config": body.vision_tower.config}
    return {part: getattr(config, f"_{knob}_implementation") for part, config in parts.items()}


ALL = ("", "text_config", "vision_config")


@pytest.mark.parametrize(
    ("knob", "given", "wanted"),
    [
        ("attn", "eager", dict.fromkeys(ALL, "eager")),
        ("attn", "sdpa", dict.fromkeys(ALL, "sdpa")),
        (
            "attn",
            {"text_config": "eager", "vision_config": "sdpa"},
            {"": "sdpa", "text_config": "eager", "vision_config": "sdpa"},
        ),
        (
            "attn",
            {"vision_config": "eager"},
            {"": "sdpa", "text_config": "sdpa", "vision_config": "eager"},
        ),
        ("experts", "eager", dict.fromkeys(ALL, "eager")),
        ("experts", "batched_mm", dict.fromkeys(ALL, "batched_mm")),
        (
            "experts",
            {"": "batched_mm", "text_config": "eager", "vision_config": "grouped_mm"},
            {"": "batched_mm", "text_config": "eager", "vision_config": "grouped_mm"},
        ),
        (
            "experts",
            {"vision_config": "eager"},
            {"": "grouped_mm", "text_config": "grouped_mm", "vision_config": "eager"},
        ),
    ],
    ids=str,
)
@torch.no_grad()
def test_implementations_reach_the_parts_that_they_name(saved, knob, given, wanted):
    model, plain = load(saved, **{f"{knob}_implementation": given}), load(saved)
    assert implementations(model, knob) == wanted
    real = batch()["attention_mask"].bool()  # what stands at padding is nobody's business
    assert gap(model(**batch()).logits[real], plain(**batch()).logits[real]) <= 1e-5
    getattr(plain, f"set_{knob}_implementation")(given)
    assert implementations(plain, knob) == wanted


@torch.no_grad()
def test_the_named_kernels_are_the_ones_that_run(saved, monkeypatch):
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    ran = []

    def spy(name):
        kernel = ALL_EXPERTS_FUNCTIONS[name]

        def run(self, *args, **kwargs):
            ran.append((name, self.config.__class__.__name__))
            return kernel(self, *args, **kwargs)

        return run

    for name in ("batched_mm", "grouped_mm"):
        monkeypatch.setitem(ALL_EXPERTS_FUNCTIONS, name, spy(name))
    given = {"": "batched_mm", "text_config": "grouped_mm", "vision_config": "batched_mm"}
    load(saved, experts_implementation=given)(**batch())
    assert set(ran) == {
        ("batched_mm", "VLMoEConfig"),  # the connector
        ("grouped_mm", "LlamaConfig"),
        ("batched_mm", "SiglipVisionConfig"),
    }
