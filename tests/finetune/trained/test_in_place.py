"""A host's VLM that is sparse in place: whole weights, rates of parts, and LoRA on its packed LLM."""

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from transformers import AutoModelForImageTextToText

from modeling_vlmoe.conversion import UpcycleArguments, upcycle
from modeling_vlmoe.finetune import build_trainer, finetune
from modeling_vlmoe.finetune import train as runs
from modeling_vlmoe.quantization import expert_bytes
from tests import hosts
from tests.finetune.host_rows import template

pytestmark = pytest.mark.slow


@pytest.fixture(scope="session")
def sparse(tmp_path_factory):
    root, made = tmp_path_factory.mktemp("in_place"), {}

    def get(family):
        if family not in made:
            dense = hosts.save(root / family / "dense", family)
            (dense / "chat_template.jinja").write_text(template(family))
            given = {"vlm_model": str(dense), "output_dir": str(root / family / "sparse")}
            made[family] = upcycle(UpcycleArguments(**given, text_experts=4, vision_experts=3))
        return made[family]

    return get


@pytest.mark.parametrize("family", ["qwen2_5_vl", "smolvlm", "llava_next", "gemma3"])
def test_full_changes_what_is_named(family, sparse, arguments):
    rates = {"learning_rates": {"vision.experts": 1e-3}}
    folder = finetune(arguments(model=str(sparse(family)), method="full", train=["moe-layers", "connector"], **rates))
    before, after = (AutoModelForImageTextToText.from_pretrained(one).state_dict() for one in (sparse(family), folder))
    changed = {name for name, value in before.items() if not torch.equal(value, after[name])}
    model = AutoModelForImageTextToText.from_pretrained(folder)
    cells = runs.parameter_cells(model)
    assert {cells[name].partition(".")[0] for name in changed} == {"experts", "routers", "vision", "connector"}
    assert all(
        cells[name].endswith(("experts", "routers")) or cells[name].startswith("connector.") for name in changed
    )


def test_lora_trains_on_a_packed_llm_and_leaves_the_vit_as_it_is(sparse, arguments, monkeypatch):
    seen = []
    monkeypatch.setattr(runs, "build_trainer", lambda *given: seen.append(build_trainer(*given)) or seen[-1])
    finetune(arguments(model=str(sparse("qwen2_5_vl")), quantize_bits=4, save_strategy="no", max_steps=8))
    trainer = seen[0]
    model = trainer.model.get_base_model()
    packed = [name for name, one in model.named_modules() if isinstance(one, Linear4bit)]
    assert packed
    assert all(name.startswith("model.language_model.") for name in packed)
    codes = {name: one for name, one in model.named_parameters() if one.dtype == torch.uint8 and ".experts." in name}
    assert len(codes) == 2 * len(model.config.text_moe.layers)
    assert all(name.startswith("model.language_model.") for name in codes)
    whole = expert_bytes(AutoModelForImageTextToText.from_pretrained(sparse("qwen2_5_vl")))
    of_text = sum(size for name, size in whole.items() if "language_model" in name)
    assert sum(one.numel() for one in codes.values()) == of_text / 8  # half a byte for four
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]


def test_raises_when_the_llm_is_not_where_packing_looks(sparse, arguments):
    with pytest.raises(ValueError, match=r"packs the LLM at model.language_model, but SmolVLM.* has it at model.text"):
        finetune(arguments(model=str(sparse("smolvlm")), quantize_bits=4))
