"""Parents as users have them: a text tower or a ViT inside a multimodal checkpoint."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

from modeling_vlmoe import VLMoEForConditionalGeneration
from modeling_vlmoe.conversion import ProofError, upcycle
from modeling_vlmoe.conversion.planning import plan_upcycle
from modeling_vlmoe.conversion.upcycle import write_proved
from modeling_vlmoe.towers import sparse_blocks
from tests import tiny
from tests.conversion.conftest import ALL_SPARSE
from tests.conversion.multimodal_parents import save_whole
from tests.conversion.sparse_checkpoints import save_llava
from tests.models import gap

LIMIT = 1e-5
WITH_LLM = ("gemma3", "mistral3", "qwen3_5", "llava")


def save(folder, family, **options):
    return save_llava(folder, "llama", **options) if family == "llava" else save_whole(folder, family, **options)


def load(folder):
    return AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()


def edit_config(folder, **values):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


@torch.no_grad()
def text_gap(whole, sparse):
    """To the whole model on text alone."""
    ids = torch.randint(6, 290, (2, 30), generator=torch.Generator().manual_seed(5))
    wanted = load(whole)(input_ids=ids).logits
    return gap(sparse(input_ids=ids).logits[..., : wanted.shape[-1]], wanted)


@pytest.mark.parametrize("family", WITH_LLM)
def test_an_llm_inside_a_multimodal_checkpoint(tmp_path, arguments, family):
    whole = save(tmp_path / "whole", family)
    out = upcycle(arguments(text_model=whole, **ALL_SPARSE))
    sparse = load(out)
    assert len(sparse_blocks(sparse)) == 3 + 2 + 1
    assert text_gap(whole, sparse) <= LIMIT
    receipt = json.loads((out / "upcycle_receipt.json").read_text())
    assert receipt["parents"]["text"]["model_type"] == family
    (reason,) = {reason.partition(", not of ")[0] for reason in receipt["mapping"]["dropped"]["text"]}
    assert reason == f"part of {json.loads((whole / 'config.json').read_text())['architectures'][0]}"


@torch.no_grad()
@pytest.mark.parametrize("family", ["gemma3", "llava"])
def test_a_vit_inside_a_multimodal_checkpoint(tmp_path, arguments, family):
    whole = save(tmp_path / "whole", family)
    sparse = load(upcycle(arguments(vision_model=whole, **ALL_SPARSE)))
    pixels = torch.randn(2, 3, tiny.IMAGE_SIZE, tiny.IMAGE_SIZE)
    wanted, got = (
        model.model.vision_tower(pixels, output_hidden_states=True).hidden_states[-2]
        for model in (load(whole), sparse)
    )
    assert gap(got, wanted) <= LIMIT


def test_both_towers_of_one_checkpoint(tmp_path, arguments):
    whole = save_whole(tmp_path / "whole", "gemma3", torch.bfloat16, "20KB")
    assert len(list(whole.glob("model-*.safetensors"))) > 2
    sparse = load(upcycle(arguments(text_model=whole, vision_model=whole, **ALL_SPARSE)))
    assert text_gap(whole, sparse) <= LIMIT


@pytest.mark.parametrize("is_head_stored", [False, True])
def test_a_head_is_tied_as_the_whole_model_ties_it(tmp_path, arguments, is_head_stored):
    """Mistral-3's configuration ties by default; a checkpoint that holds an unlike head is not tied, as on loading."""
    whole = save_whole(tmp_path / "whole", "mistral3", tie_word_embeddings=not is_head_stored)
    edit_config(whole, tie_word_embeddings=True)
    assert any("lm_head" in name for name in load_file(whole / "model.safetensors")) == is_head_stored
    out = upcycle(arguments(text_model=whole))
    assert load(out).config.tie_word_embeddings is not is_head_stored
    assert text_gap(whole, load(out)) <= LIMIT


def test_the_proof_runs_the_hosts_own_causal_lm(tmp_path, arguments):
    plan = plan_upcycle(arguments(text_model=save_whole(tmp_path / "whole", "gemma3")))
    assert type(plan.dense["text"].model).__name__ == "Gemma3ForCausalLM"
    assert "lm_head.weight" not in plan.dense["text"].names


@pytest.mark.parametrize("name", ["experts.gate_up_proj", "self_attn.q_proj.weight", "input_layernorm.weight"])
def test_raises_when_a_tensor_inside_is_mistaken_for_another(tmp_path, arguments, name, leaves_nothing):
    plan = plan_upcycle(arguments(text_model=save_whole(tmp_path / "whole", "gemma3"), text_experts=2))
    places = {one.spec.name: place for place, one in enumerate(plan.mapping.assignments)}
    own, other = (
        next(one for one in places if f"language_model.layers.{index}." in one and one.endswith(name))
        for index in (1, 2)
    )
    taken = plan.mapping.assignments[places[other]].dense
    plan.mapping.assignments[places[own]] = replace(plan.mapping.assignments[places[own]], dense=taken)
    with leaves_nothing(), pytest.raises(ProofError, match="differs by"):
        write_proved(plan, tmp_path / "out", force=False)


# What cannot be a parent is refused ----------------------------------------------------------


def test_raises_when_the_llm_inside_has_no_causal_lm(tmp_path, arguments):
    whole = save_whole(tmp_path / "whole", "qwen2_5_vl")
    with pytest.raises(
        ValueError, match=r"no causal LM of its own for the qwen2_5_vl_text inside .*Expected a causal"
    ):
        plan_upcycle(arguments(text_model=whole))


def test_raises_when_the_llm_inside_is_sparse(tmp_path, arguments):
    llava = save_llava(tmp_path / "llava", "qwen3_moe")
    with pytest.raises(ValueError, match=r"is already sparse: its LLM's qwen3_moe configuration has num_experts"):
        plan_upcycle(arguments(text_model=llava))


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (
            lambda tensors: tensors.pop("language_model.model.layers.1.mlp.up_proj.weight"),
            "lacks tensors of Gemma3For",
        ),
        (lambda tensors: tensors.update({"audio_tower.weight": torch.ones(1)}), "no place for: audio_tower.weight"),
    ],
    ids=["missing", "strange"],
)
def test_raises_when_a_whole_checkpoint_is_not_whole(tmp_path, arguments, edit, message):
    whole = save_whole(tmp_path / "whole", "gemma3")
    tensors = load_file(whole / "model.safetensors")
    edit(tensors)
    save_file(tensors, whole / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=message):
        plan_upcycle(arguments(text_model=whole))


def test_raises_when_the_vit_inside_has_no_class_of_its_own(tmp_path, arguments):
    from transformers import Qwen2VLConfig

    Qwen2VLConfig().save_pretrained(tmp_path / "whole")
    with pytest.raises(ValueError, match=r"has a qwen2_vl_vision inside, for which transformers has no class"):
        plan_upcycle(arguments(vision_model=tmp_path / "whole"))


# In memory -----------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("family", ["gemma3", "llava", "qwen2_5_vl"])
def test_in_memory_a_vit_is_taken_out_of_a_larger_model(tmp_path, parents, family):
    whole = save(tmp_path / "whole", family)
    model = VLMoEForConditionalGeneration.from_vision_text_pretrained(
        str(whole), str(parents / "llama"), vision_moe={"num_experts": 2}, image_token_id=295
    )
    inside = next(tower for name, tower in load(whole).model.named_children() if name in ("vision_tower", "visual"))
    image = {"pixel_values": torch.randn(1, 3, tiny.IMAGE_SIZE, tiny.IMAGE_SIZE)}
    if family == "qwen2_5_vl":
        image = {"pixel_values": torch.randn(16, 3 * 2 * 8 * 8), "grid_thw": torch.tensor([[1, 4, 4]])}
    pixels = image.pop("pixel_values")
    got, wanted = (one(pixels, **image).last_hidden_state for one in (model.model.vision_tower, inside))
    assert gap(got, wanted) <= LIMIT


def test_raises_when_an_llm_is_to_be_taken_out_in_memory(tmp_path, parents):
    whole = save_whole(tmp_path / "whole", "gemma3")
    with pytest.raises(ValueError, match=r"is a gemma3, of which the LLM is a part.*`vlmoe upcycle --text-model`"):
        VLMoEForConditionalGeneration.from_vision_text_pretrained(str(parents / "siglip"), str(whole))
