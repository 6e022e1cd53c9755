"""The acceptance: a written checkpoint, loaded as a user loads it, computes what its dense parents compute."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer

from modeling_vlmoe.conversion import UpcycleArguments, upcycle
from modeling_vlmoe.towers import sparse_blocks
from tests import tiny
from tests.conversion.conftest import ALL_SPARSE
from tests.models import PAIRS, gap

LIMIT = 1e-5


@torch.no_grad()
def text_gap(parent, sparse, vocabulary=290):
    """Of the text logits, over the parent's vocabulary; token ids stay below the image token's."""
    dense = AutoModelForCausalLM.from_pretrained(parent, dtype=torch.float32).eval()
    tokens = torch.randint(vocabulary, (2, 40), generator=torch.Generator().manual_seed(5))
    wanted = dense(tokens).logits
    return gap(sparse(input_ids=tokens).logits[..., : wanted.shape[-1]], wanted)


@torch.no_grad()
def vision_gap(parent, sparse):
    """The largest of what the connector reads, the last hidden state and the pooled output."""
    dense = AutoModel.from_pretrained(parent, dtype=torch.float32).eval()
    dense = getattr(dense, "vision_model", dense)
    pixels = torch.randn(2, 3, tiny.IMAGE_SIZE, tiny.IMAGE_SIZE, generator=torch.Generator().manual_seed(6))
    wanted = dense(pixels, output_hidden_states=True)
    got = sparse.model.vision_tower(pixels, output_hidden_states=True)
    pairs = [(got.hidden_states[-2], wanted.hidden_states[-2])]
    pairs += [(got[name], wanted[name]) for name in ("last_hidden_state", "pooler_output")]
    return max(gap(one, other) for one, other in pairs)


def load(folder):
    return AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.mark.parametrize(("text", "vision"), PAIRS)
def test_upcycled_model_gives_dense_logits_and_features(parents, tmp_path, text, vision):
    settings = {
        "text_model": str(parents / text),
        "vision_model": str(parents / vision),
        "output_dir": str(tmp_path / "out"),
    }
    sparse = load(upcycle(UpcycleArguments(**settings, **ALL_SPARSE)))
    assert len(sparse_blocks(sparse)) == 3 + 2 + 1
    assert text_gap(parents / text, sparse) <= LIMIT
    assert vision_gap(parents / vision, sparse) <= LIMIT


@torch.no_grad()
def test_the_connector_of_one_seed_is_the_same_dense_and_sparse(arguments, tmp_path):
    def features(name, **experts):
        model = load(upcycle(arguments(output_dir=tmp_path / name, **experts)))
        return torch.stack(model.get_image_features(pixels).pooler_output)

    pixels = torch.randn(1, 3, tiny.IMAGE_SIZE, tiny.IMAGE_SIZE)
    dense, sparse = features("dense", text_experts=2), features("sparse", connector_experts=4)
    assert gap(sparse, dense) <= LIMIT
    assert gap(features("other", text_experts=2, seed=1), dense) > 0.1


def unlike(folder, tensors, **options):
    """Saves tensors in the place of a parent's own."""
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"}, **options)


def test_a_sharded_tied_bf16_parent(tmp_path, parents, arguments):
    text = tiny.save_text_parent(
        tmp_path / "text", "qwen3", torch.bfloat16, shard_size="20KB", tie_word_embeddings=True
    )
    assert len(list(text.glob("model-*.safetensors"))) > 2
    out = upcycle(arguments(text_model=text, text_experts=4))
    written = load_file(out / "model.safetensors")
    assert "lm_head.weight" not in written
    kinds = {("router" in name): tensor.dtype for name, tensor in written.items()}
    assert kinds == {False: torch.bfloat16, True: torch.float32}
    assert text_gap(text, load(out)) <= LIMIT


def test_a_written_checkpoint_may_be_sharded(monkeypatch, parents, arguments):
    monkeypatch.setattr("modeling_vlmoe.conversion.streaming.write_checkpoint.__defaults__", (200_000,))
    out = upcycle(arguments(**ALL_SPARSE))
    assert len(list(out.glob("model-*.safetensors"))) > 3
    sparse = load(out)
    assert text_gap(parents / "llama", sparse) <= LIMIT
    assert vision_gap(parents / "siglip", sparse) <= LIMIT


@pytest.mark.parametrize("vision", tiny.VISION_FAMILIES)
def test_a_vit_inside_a_whole_checkpoint(tmp_path, arguments, vision):
    whole = tiny.save_vision_parent(tmp_path / "whole", vision, whole=True)
    assert vision_gap(whole, load(upcycle(arguments(vision_model=whole, vision_experts=4)))) <= LIMIT


def test_old_names_of_a_checkpoint_are_renamed(copied, arguments):
    """CLIP and SigLIP towers had a `vision_model.` in front, and LLMs kept rotary frequencies."""
    vision, text = copied("siglip"), copied("llama")
    unlike(
        vision, {f"vision_model.{name}": tensor for name, tensor in load_file(vision / "model.safetensors").items()}
    )
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    unlike(text, load_file(text / "model.safetensors") | extra)
    sparse = load(upcycle(arguments(text_model=text, vision_model=vision, **ALL_SPARSE)))
    assert text_gap(text, sparse) <= LIMIT
    assert vision_gap(vision, sparse) <= LIMIT


def test_a_base_model_without_its_prefix(copied, arguments):
    text = copied("llama")
    unlike(
        text, {name.removeprefix("model."): tensor for name, tensor in load_file(text / "model.safetensors").items()}
    )
    assert text_gap(text, load(upcycle(arguments(text_model=text)))) <= LIMIT


def test_a_new_image_token_gets_the_mean_row(tmp_path, arguments):
    size = len(tiny.tokenizer())
    text = tiny.save_text_parent(tmp_path / "text", "llama", vocab_size=size)
    out = upcycle(arguments(text_model=text, **ALL_SPARSE))
    sparse = load(out)
    assert sparse.config.image_token_id == size
    assert sparse.config.text_config.vocab_size == size + 1
    for rows in (sparse.get_input_embeddings().weight, sparse.lm_head.weight):
        torch.testing.assert_close(rows[size], rows[:size].mean(0))
    assert text_gap(text, sparse, size) <= LIMIT
    assert len(AutoTokenizer.from_pretrained(out)) == size + 1


def test_a_dtype_that_is_asked_for(parents, arguments):
    out = upcycle(arguments(dtype="bfloat16", **ALL_SPARSE))
    model = AutoModelForImageTextToText.from_pretrained(out)
    assert model.dtype == torch.bfloat16
    dense = AutoModelForCausalLM.from_pretrained(parents / "llama", dtype=torch.bfloat16).float()
    tokens = torch.randint(290, (1, 20))
    assert gap(load(out)(input_ids=tokens).logits, dense(tokens).logits) <= LIMIT


@torch.no_grad()
def test_a_dense_vlmoe_model_is_a_parent_too(tmp_path, arguments):
    dense = load(upcycle(arguments(output_dir=tmp_path / "first", connector_experts=1, connector_top_k=1)))
    folder = save_dense_vlm(dense, tmp_path)
    dense = load(folder)
    again = load(upcycle(UpcycleArguments(vlm_model=str(folder), output_dir=str(tmp_path / "out"), **ALL_SPARSE)))
    assert len(sparse_blocks(again)) == 6
    tokens = torch.cat(
        [torch.tensor([7, 8]), torch.full((tiny.NUM_PATCHES,), dense.config.image_token_id), torch.tensor([9])]
    )
    inputs = {"input_ids": tokens[None], "pixel_values": torch.randn(1, 3, tiny.IMAGE_SIZE, tiny.IMAGE_SIZE)}
    assert gap(again(**inputs).logits, dense(**inputs).logits) <= LIMIT


def test_dense_then_sparse_is_sparse_at_once(tmp_path, arguments):
    size = len(tiny.tokenizer())
    text = tiny.save_text_parent(tmp_path / "text", "llama", torch.bfloat16, vocab_size=size)  # one row is new
    options = {"text_model": text, "vision_feature_layer": [-2, -1]}
    dense = upcycle(arguments(output_dir=tmp_path / "dense", dense=True, **options))
    assert sparse_blocks(load(dense)) == []
    again = upcycle(UpcycleArguments(vlm_model=str(dense), output_dir=str(tmp_path / "again"), **ALL_SPARSE))
    at_once = upcycle(arguments(**options, **ALL_SPARSE))
    got, wanted = (load_file(folder / "model.safetensors") for folder in (again, at_once))
    torch.testing.assert_close(got, wanted, rtol=0, atol=0)


def save_dense_vlm(model, tmp_path):
    """A wholly dense vlmoe model with a connector of its own, as tuning would leave it."""
    from transformers import AutoProcessor

    from modeling_vlmoe import VLMoEConfig, VLMoEForConditionalGeneration

    config = VLMoEConfig(
        text_config=tiny.text_config("llama"),
        vision_config=tiny.vision_config("siglip"),
        image_token_id=model.config.image_token_id,
    )
    dense = tiny.redraw(VLMoEForConditionalGeneration(config))
    dense.save_pretrained(tmp_path / "dense")
    AutoProcessor.from_pretrained(tmp_path / "first").save_pretrained(tmp_path / "dense")
    return tmp_path / "dense"
