"""ViTs that take images of any size as parents, alone or inside a checkpoint: proved, and counted right."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoProcessor

from modeling_vlmoe.conversion import ExportArguments, UpcycleArguments, export, upcycle
from modeling_vlmoe.conversion.planning import plan_upcycle
from modeling_vlmoe.conversion.verify import prove
from modeling_vlmoe.towers import sparse_blocks
from tests import tiny
from tests.conversion.multimodal_parents import save_whole
from tests.models import gap
from tests.variable_images import FIELDS, SIZES, SPARSE_TOWERS, TOWERS, image_processor, pictures, vision_model

LIMIT = 1e-5


def load(folder):
    return AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def vits(tmp_path_factory):
    """A folder with one ViT of each family, to be read only."""
    root = tmp_path_factory.mktemp("vits")
    for family in TOWERS:
        vision_model(family).save_pretrained(root / family)
        image_processor(family).save_pretrained(root / family)
    return root


@pytest.fixture(scope="module")
def pixtral(vits, parents, tmp_path_factory):
    """A dense Llama + Pixtral, to be read only."""
    given = {"text_model": str(parents / "llama"), "vision_model": str(vits / "pixtral")}
    return upcycle(UpcycleArguments(**given, output_dir=str(tmp_path_factory.mktemp("model") / "out"), dense=True))


@torch.no_grad()
@pytest.mark.parametrize("family", TOWERS)
def test_an_upcycled_vit_gives_dense_features_for_every_size(vits, arguments, family):
    experts = {"vision_experts": 2} if family in SPARSE_TOWERS else {}
    out = upcycle(arguments(vision_model=vits / family, connector_experts=2, **experts))
    sparse, processor, dense = load(out), AutoProcessor.from_pretrained(out), vision_model(family)
    assert len(sparse_blocks(sparse)) == 1 + (2 if "qwen2" in family else 2 if experts else 0)
    form = sparse.model.image_form
    inputs = processor(text="<image>a" * len(SIZES), images=pictures(), return_tensors="pt")
    images = {name: inputs[key] for key, name in form.arguments.items()}
    wanted = dense(inputs["pixel_values"], **images, output_hidden_states=True)
    got = sparse.model.vision_tower(inputs["pixel_values"], **images, output_hidden_states=True)
    for name in ("last_hidden_state", "pooler_output"):
        if wanted.get(name) is not None:
            assert gap(got[name], wanted[name]) <= LIMIT
    assert gap(got.hidden_states[-2], wanted.hidden_states[-2]) <= LIMIT
    sparse(**inputs)  # as many tokens as features
    receipt = json.loads((out / "upcycle_receipt.json").read_text())
    assert receipt["settings"]["num_image_tokens"] is None
    assert "as its size asks for" in (out / "README.md").read_text()


@pytest.mark.parametrize("family", ["siglip2_vision_model", "qwen2_5_vl_vision"])
def test_a_float32_vit_beside_a_bf16_llm(vits, tmp_path, arguments, family):
    text = tiny.save_text_parent(tmp_path / "text", "llama", torch.bfloat16)
    assert upcycle(arguments(text_model=text, vision_model=vits / family, vision_experts=2))


@torch.no_grad()
@pytest.mark.parametrize(
    ("family", "tower", "vit"),
    [
        ("mistral3", "vision_tower", "pixtral"),
        ("qwen2_5_vl", "visual", "qwen2_5_vl_vision"),
        ("qwen3_vl", "visual", "qwen3_vl_vision"),
    ],
)
def test_a_vit_inside_a_multimodal_checkpoint(tmp_path, arguments, family, tower, vit):
    """Qwen2.5-VL's is stored under its old name, `visual.`."""
    whole = save_whole(tmp_path / "whole", family)
    processor = image_processor(vit)
    processor.patch_size = {"height": 8, "width": 8} if vit == "pixtral" else 8
    processor.save_pretrained(whole)
    names = load_file(whole / "model.safetensors")
    assert any(name.startswith(f"{tower}.") for name in names) == (family != "qwen3_vl")
    experts = {"vision_experts": 2} if vit in SPARSE_TOWERS else {}
    out = upcycle(arguments(vision_model=whole, **experts))
    sparse = load(out)
    inputs = AutoProcessor.from_pretrained(out)(text="<image>" * 2, images=pictures(SIZES[:2]), return_tensors="pt")
    images = {name: inputs[key] for key, name in sparse.model.image_form.arguments.items()}
    wanted, got = (
        one(inputs["pixel_values"], **images, output_hidden_states=True).last_hidden_state
        for one in (getattr(load(whole).model, tower), sparse.model.vision_tower)
    )
    assert gap(got, wanted) <= LIMIT


@torch.no_grad()
def test_both_towers_of_one_checkpoint(tmp_path, arguments):
    """Qwen3.5: linear attention in the LLM, packed patches in the ViT."""
    whole = save_whole(tmp_path / "whole", "qwen3_5", torch.bfloat16)
    processor = image_processor("qwen3_5_vision")
    processor.patch_size = 8
    processor.save_pretrained(whole)
    out = upcycle(arguments(text_model=whole, vision_model=whole, text_experts=2, connector_experts=2))
    sparse, dense = load(out), load(whole)
    inputs = AutoProcessor.from_pretrained(out)(text="a<image>b", images=pictures(SIZES[:1]), return_tensors="pt")
    wanted, got = (
        tower(inputs["pixel_values"], grid_thw=inputs["image_grid_thw"]).pooler_output
        for tower in (dense.model.visual, sparse.model.vision_tower)
    )
    assert gap(got, wanted) <= LIMIT
    ids = torch.randint(6, 290, (2, 20))
    assert gap(sparse(input_ids=ids).logits[..., :320], dense(input_ids=ids).logits) <= LIMIT
    assert sparse.generate(**inputs, max_new_tokens=3, do_sample=False, pad_token_id=0).shape[1] > 3


@torch.no_grad()
def test_a_naflex_vit_inside_a_whole_siglip2(tmp_path, arguments):
    text = {name: tiny.VISION_FIELDS[name] for name in ("hidden_size", "intermediate_size", "num_attention_heads")}
    config = AutoConfig.for_model(
        "siglip2",
        vision_config=dict(FIELDS["siglip2_vision_model"]),
        text_config=text | {"num_hidden_layers": 2, "vocab_size": 50, "bos_token_id": 1, "eos_token_id": 2},
    )
    whole = tiny.redraw(AutoModel.from_config(config)).eval()
    whole.save_pretrained(tmp_path / "whole")
    image_processor("siglip2_vision_model").save_pretrained(tmp_path / "whole")
    sparse = load(upcycle(arguments(vision_model=tmp_path / "whole", vision_experts=2)))
    made = image_processor("siglip2_vision_model")(pictures(), return_tensors="pt")
    wanted, got = (tower(**made).last_hidden_state for tower in (whole.vision_model, sparse.model.vision_tower))
    assert gap(got, wanted) <= LIMIT


@torch.no_grad()
def test_dense_then_sparse(pixtral, tmp_path):
    out = upcycle(UpcycleArguments(vlm_model=str(pixtral), output_dir=str(tmp_path / "out"), vision_experts=2))
    made = AutoProcessor.from_pretrained(out)(text="a<image>b", images=pictures(SIZES[:1]), return_tensors="pt")
    assert gap(load(out)(**made).logits, load(pixtral)(**made).logits) <= LIMIT


MUTANTS = {
    "larger tokens": ("processor_config.json", {"image_token_side": 8}, r"gives a picture \d+ tokens .* \d+ features"),
    "other sizes": (
        "processor_config.json",
        {"image_sizes_name": "spatial_shapes"},
        "cannot read a picture: .*spatial",
    ),
    "one size": (
        "processor_config.json",
        {"image_sizes_name": None, "image_token_side": None, "num_image_tokens": 9},
        "takes padded images: expected pixel_values, image_sizes",
    ),
    "another feature layer": ("config.json", {"vision_feature_layer": -1}, "image features.* differs by"),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_raises_when_what_is_written_is_a_mutant(pixtral, vits, parents, tmp_path, name):
    file, change, message = MUTANTS[name]
    written = shutil.copytree(pixtral, tmp_path / "written")
    (written / file).write_text(json.dumps(json.loads((written / file).read_text()) | change))
    given = {"text_model": str(parents / "llama"), "vision_model": str(vits / "pixtral"), "dense": True}
    with pytest.raises(ValueError, match=message):
        prove(plan_upcycle(UpcycleArguments(**given)), written)


# What cannot be a parent is refused ----------------------------------------------------------


@pytest.mark.parametrize("family", TOWERS)
def test_raises_when_the_image_processor_gives_one_size(vits, tmp_path, arguments, family):
    vision = shutil.copytree(vits / family, tmp_path / "vision")
    tiny.image_processor("siglip").save_pretrained(vision)
    with pytest.raises(ValueError, match=r"is a SiglipImageProcessorPil, which gives no .*Take the one that the ViT"):
        plan_upcycle(arguments(vision_model=vision))


@pytest.mark.parametrize("family", TOWERS)
def test_raises_when_the_image_processor_is_for_other_patches(vits, tmp_path, arguments, family):
    vision = shutil.copytree(vits / family, tmp_path / "vision")
    processor = image_processor(family)
    processor.patch_size = {"height": 6, "width": 6} if family == "pixtral" else 6
    processor.save_pretrained(vision)
    with pytest.raises(ValueError, match=r"was built for patches of 4 pixels a side .* Set patch_size, merge_size in"):
        plan_upcycle(arguments(vision_model=vision))


def test_raises_when_a_vit_of_one_size_gets_sizes(parents, tmp_path, arguments):
    vision = shutil.copytree(parents / "siglip", tmp_path / "vision")
    image_processor("siglip2_vision_model").save_pretrained(vision)
    with pytest.raises(
        ValueError, match=r"makes \(1, 30, 48\) of one picture; expected \(1, channels, height, width\)"
    ):
        plan_upcycle(arguments(vision_model=vision))


def test_raises_when_a_vlm_parents_processor_counts_otherwise(pixtral, tmp_path):
    folder = shutil.copytree(pixtral, tmp_path / "model")
    file = folder / "processor_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"image_token_side": 8}))
    with pytest.raises(ValueError, match=r"image_token_side 8, but its ViT takes image_sizes and 4. Correct its proc"):
        plan_upcycle(UpcycleArguments(vlm_model=str(folder)))


def test_export_refuses_what_llavas_processor_does_not_count(pixtral, tmp_path):
    with pytest.raises(
        ValueError, match=r"The pixtral takes padded images, of which LLaVA's processor does not count"
    ):
        export(ExportArguments(checkpoint=str(pixtral), output_dir=str(tmp_path / "out")))
    export(ExportArguments(checkpoint=str(pixtral), output_dir=str(tmp_path / "out"), to="text"))
