"""Any dense VLM of transformers is a parent: sparse in place, it computes, reads and writes what it did before."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from torch.nn.utils.parametrize import is_parametrized
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, is_torchvision_available

from modeling_vlmoe.cli import describe_result
from modeling_vlmoe.conversion import ProofError, UpcycleArguments, upcycle
from modeling_vlmoe.conversion.host_planning import other_vits, plan_in_place
from modeling_vlmoe.conversion.host_processor_classes import VIDEO
from modeling_vlmoe.conversion.host_processors import load_processor, process_video, processor_files
from modeling_vlmoe.conversion.parents import open_parents
from modeling_vlmoe.conversion.planning import asked_experts, plan_upcycle
from modeling_vlmoe.conversion.upcycle import preview, write_proved
from modeling_vlmoe.push_checks import check_folder
from modeling_vlmoe.quantization import quantize_experts
from modeling_vlmoe.towers import sparse_blocks
from tests import hosts, tiny
from tests.conversion.conftest import host_options
from tests.models import gap

LIMIT = 1e-5
FAMILIES = list(hosts.HOSTS)
WITH_TILES = [family for family, host in hosts.HOSTS.items() if host.tiles is not None]
WITH_VIDEOS = [name for name, host in hosts.HOSTS.items() if VIDEO in hosts.processor_class(host).get_attributes()]
# Their videos are packed like their pictures, or are pictures.
PACKED_VIDEOS = ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"]


def load(folder):
    return AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()


def pair(upcycled_host, family):
    """Both models and the written processor."""
    dense, sparse = upcycled_host(family)
    return load(dense), load(sparse), load_processor(sparse, family, family)[0]


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("num_images", [(1,), (2,), (1, 2)], ids=str)
def test_a_host_gives_the_dense_logits_and_tokens(upcycled_host, family, num_images):
    """One picture, several of unlike sizes, and rows of unlike numbers of pictures."""
    dense, sparse, processor = pair(upcycled_host, family)
    host, given = hosts.HOSTS[family], hosts.inputs(processor, family, num_images)
    assert isinstance(sparse, type(dense))
    num_layers = sparse.config.get_text_config().num_hidden_layers
    assert len(sparse_blocks(sparse)) == num_layers + (host.layers - max(1, host.layers // 2)) + host.has_connector
    assert gap(sparse(**given).logits, dense(**given).logits) <= LIMIT
    generated = [one.generate(**given, max_new_tokens=8, do_sample=False) for one in (sparse, dense)]
    assert torch.equal(*generated)


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_a_row_of_a_padded_batch_is_what_it_is_alone(upcycled_host, family):
    _, sparse, processor = pair(upcycled_host, family)
    host = hosts.HOSTS[family]
    texts = [f"{host.place} what?", f"{host.place} what colour is the shape?"]
    pictures = [hosts.picture(1), hosts.picture(2)]
    made = processor(text=texts, images=[[one] for one in pictures], padding=True, return_tensors="pt")
    made = hosts.accepted(family, made)
    assert not made["attention_mask"].all()
    together = sparse(**made).logits
    for row, (text, picture) in enumerate(zip(texts, pictures, strict=True)):
        alone = hosts.accepted(family, processor(text=[text], images=[[picture]], return_tensors="pt"))
        logits = sparse(**alone).logits[0]
        assert gap(together[row, -len(logits) :], logits) <= 2 * LIMIT


@torch.no_grad()
@pytest.mark.parametrize("family", WITH_TILES)
def test_tiling_on_and_off(upcycled_host, family):
    dense, sparse, processor = pair(upcycled_host, family)
    host, counts = hosts.HOSTS[family], []
    for is_tiled in (True, False):
        given = hosts.inputs(processor, family, (2,), **{host.tiles: is_tiled}, **host.tiling)
        counts.append(given["input_ids"].shape[1])
        assert gap(sparse(**given).logits, dense(**given).logits) <= LIMIT
    assert counts[0] > counts[1]


@torch.no_grad()
@pytest.mark.parametrize("family", WITH_VIDEOS)
def test_a_hosts_own_videos_are_proved_or_said_not_to_be(upcycled_host, family):
    """Its video processor needs torchvision; with it, logits and greedy tokens are the dense ones."""
    receipt = json.loads((upcycled_host(family)[1] / "upcycle_receipt.json").read_text())
    is_proved = "logits of a video and text" in receipt["proof"]["gaps"]
    assert is_proved == is_torchvision_available()
    assert (receipt["settings"]["not_proved"] is None) == is_proved
    if is_proved:
        dense, sparse, processor = pair(upcycled_host, family)
        given = process_video(processor, [hosts.picture(number, (64, 48)) for number in range(4)])
        assert gap(sparse(**given).logits, dense(**given).logits) <= LIMIT
        assert torch.equal(*(one.generate(**given, max_new_tokens=8, do_sample=False) for one in (sparse, dense)))


@torch.no_grad()
@pytest.mark.parametrize("family", PACKED_VIDEOS)
def test_a_video_beside_a_picture(upcycled_host, family):
    """Frames are packed as the pictures' patches are; the video's placeholders stand where the processor puts them."""
    dense, sparse, processor = pair(upcycled_host, family)
    given = hosts.inputs(processor, family, (2,))
    image, video = (dense.config.image_token_id, dense.config.video_token_id)
    ids, grids = given["input_ids"].clone(), given.pop("image_grid_thw")
    num_patches = int(grids[0].prod())
    last = (ids == image).nonzero()[num_patches // 4 :, 1]  # those of the second picture
    ids[0, last] = video
    pixels = given.pop("pixel_values")
    types = given["mm_token_type_ids"].clone()
    types[0, last] = 2
    given |= {"input_ids": ids, "mm_token_type_ids": types, "pixel_values": pixels[:num_patches]}
    given |= {"image_grid_thw": grids[:1], "pixel_values_videos": pixels[num_patches:], "video_grid_thw": grids[1:]}
    assert gap(sparse(**given).logits, dense(**given).logits) <= LIMIT
    generated = [one.generate(**given, max_new_tokens=6, do_sample=False) for one in (sparse, dense)]
    assert torch.equal(*generated)


@torch.no_grad()
def test_a_video_of_frames_beside_a_picture(upcycled_host):
    """LLaVA-OneVision pools each frame, and its ViT runs twice in a pass."""
    dense, sparse, processor = pair(upcycled_host, "llava_onevision")
    given = hosts.inputs(processor, "llava_onevision")
    frames = torch.stack([given["pixel_values"][0, 0], *given["pixel_values"][0, 1:3]])
    num_tokens = len(frames) * (hosts.SIDE // hosts.PATCH // 2) ** 2 + 1
    video = torch.full((1, num_tokens), dense.config.video_token_index)
    given["input_ids"] = torch.cat([given["input_ids"], video], dim=1)
    given["attention_mask"] = torch.ones_like(given["input_ids"])
    given["pixel_values_videos"] = frames[None]
    assert gap(sparse(**given).logits, dense(**given).logits) <= LIMIT
    routed = sparse(**given, output_router_logits=True)
    assert len(routed.vision_router_logits) == 2 * 2
    generated = [one.generate(**given, max_new_tokens=6, do_sample=False) for one in (sparse, dense)]
    assert torch.equal(*generated)


@torch.no_grad()
@pytest.mark.parametrize("family", ["qwen2_vl", "idefics3"])
def test_a_tied_head_stays_tied(tmp_path, family):
    dense = hosts.save(tmp_path / "dense", family, tie_word_embeddings=True)
    out = upcycle(UpcycleArguments(vlm_model=str(dense), output_dir=str(tmp_path / "out"), text_experts=4))
    with safe_open(out / "model.safetensors", "pt") as file:
        assert "lm_head.weight" not in file.keys()  # noqa: SIM118 (no mapping)
    given = hosts.inputs(load_processor(out, "it", family)[0], family)
    assert gap(load(out)(**given).logits, load(dense)(**given).logits) <= LIMIT


@pytest.mark.parametrize("family", ["qwen2_5_vl", "smolvlm", "llava_next"])
def test_what_is_not_an_mlp_keeps_its_name_and_its_bytes(upcycled_host, family):
    dense, sparse = upcycled_host(family)
    stored, written = load(dense).state_dict(), load(sparse).state_dict()
    kept = [name for name in written if ".experts." not in name and ".router." not in name]
    assert all(torch.equal(written[name], stored[name]) for name in kept)
    with safe_open(sparse / "model.safetensors", "pt") as file:
        assert set(file.keys()) == set(written)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_processor_is_the_hosts_untouched(upcycled_host, family):
    dense, sparse = upcycled_host(family)
    names = {file.name for file in processor_files(dense)}
    assert {"tokenizer.json", "processor_config.json"} <= names
    if family == "qwen3_5":  # of which transformers takes another class than the file names, by its type
        names.remove("tokenizer_config.json")
    assert all((dense / name).read_bytes() == (sparse / name).read_bytes() for name in names)


@pytest.mark.parametrize("family", ["llava_next", "paligemma", "gemma3", "mistral3", "idefics3"])
def test_auto_processor_gives_the_hosts(upcycled_host, family):
    """The others' need torchvision, dense or sparse."""
    dense, sparse = (AutoProcessor.from_pretrained(folder) for folder in upcycled_host(family))
    assert type(dense) is type(sparse)
    text = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Which colour?"}]}]
    assert dense.apply_chat_template(text) == sparse.apply_chat_template(text)


def test_the_configuration_is_the_hosts_with_experts(upcycled_host):
    dense, sparse = (AutoConfig.from_pretrained(folder) for folder in upcycled_host("qwen2_5_vl"))
    assert isinstance(sparse, type(dense))
    assert (sparse.model_type, sparse.body_model_type) == ("vlmoe", "qwen2_5_vl")
    assert sparse.text_moe.layers == [0, 1, 2]
    assert sparse.text_config.num_experts == 4
    assert sparse.vision_moe.layers == [2, 3]
    assert not hasattr(dense.text_config, "num_experts")


def test_the_receipt_says_what_was_made_of_what(upcycled_host):
    _, sparse = upcycled_host("internvl")
    receipt = json.loads((sparse / "upcycle_receipt.json").read_text())
    assert receipt["parents"]["vlm"]["model_type"] == "internvl"
    assert receipt["settings"]["body_model_type"] == "internvl"
    assert receipt["mapping"]["new"] == {"router": 6, "connector": 0}
    assert receipt["proof"]["largest_gap"] <= receipt["proof"]["largest_gap_limit"]
    assert "logits of a picture and text" in receipt["proof"]["gaps"]


@torch.no_grad()
@pytest.mark.parametrize("family", ["qwen2_5_vl", "internvl", "gemma3", "mistral3"])
def test_a_sharded_bfloat16_parent(tmp_path, family):
    dense = hosts.save(tmp_path / "dense", family, torch.bfloat16, shard_size="60KB")
    assert len(list(dense.glob("*.safetensors"))) > 1
    out = upcycle(UpcycleArguments(vlm_model=str(dense), output_dir=str(tmp_path / "out"), text_experts=4))
    given = hosts.inputs(load_processor(out, "it", family)[0], family)
    assert gap(load(out)(**given).logits, load(dense)(**given).logits) <= LIMIT
    assert AutoModelForImageTextToText.from_pretrained(out).dtype == torch.bfloat16


def test_a_preview_says_what_would_be_written(upcycled_host):
    dense, _ = upcycled_host("smolvlm")
    text = preview(UpcycleArguments(vlm_model=str(dense)))
    assert "experts x" in text or "model.text_model.layers.*.mlp.experts.gate_up_proj [8, 96, 32]" in text
    assert "is drawn" not in text


def test_it_can_be_pushed_and_packed(upcycled_host):
    _, sparse = upcycled_host("smolvlm")
    pushed = check_folder(sparse)
    assert {"modeling_in_place.py", "processor_config.json", "tokenizer.json"} <= set(pushed.files)
    assert pushed.left_out == []
    packed = quantize_experts(AutoModelForImageTextToText.from_pretrained(sparse), bits=8)
    in_llm = [block for path, block in sparse_blocks(packed) if "text_model" in path]
    assert [is_parametrized(block.experts) for block in in_llm] == [True] * 3


def save_two_vits(folder):
    """Video-LLaVA, which has a ViT for pictures and one for videos."""
    vision = tiny.VISION_FIELDS | {"model_type": "clip_vision_model"}
    text = tiny.TEXT_FIELDS | {"model_type": "llama"}
    config = AutoConfig.for_model("video_llava", text_config=text, vision_config=vision)
    AutoModelForImageTextToText.from_config(config).save_pretrained(folder)
    return folder


def test_a_second_vit_that_stays_dense_is_named(upcycled_host, tmp_path):
    """In what is planned, in the receipt, and where the command says what it wrote."""
    folder = save_two_vits(tmp_path / "dense")
    args = UpcycleArguments(vlm_model=str(folder), vision_experts=4)
    parent = open_parents(args)["vlm"]
    plan = plan_in_place(args, asked_experts(args), parent, (hosts.processor("llava_next"), None))
    named = ["model.video_tower (CLIPVisionModel)"]
    assert plan.config.vision_moe.num_experts == 4
    assert plan.describe_images()["dense_vits"] == named
    assert plan.remarks == [f"stays dense: {named[0]}, beside the ViT with experts"]
    args = UpcycleArguments(vlm_model=str(folder), text_experts=4)  # nothing was asked of any ViT
    assert plan_in_place(args, asked_experts(args), parent, (plan.processor, None)).remarks == []

    receipt = json.loads((upcycled_host("smolvlm")[1] / "upcycle_receipt.json").read_text())
    assert receipt["settings"]["dense_vits"] == []
    receipt["settings"]["dense_vits"] = named
    (tmp_path / "upcycle_receipt.json").write_text(json.dumps(receipt))
    assert f"stays dense: {named[0]}" in describe_result(tmp_path)


def test_of_two_vits_in_one_vlm_each_is_told():
    with torch.device("meta"):
        hybrid = AutoModelForImageTextToText.from_config(AutoConfig.for_model("deepseek_vl_hybrid"))
    assert other_vits(hybrid) == ["model.high_res_vision_model (SamVisionModel)"]
    for family in FAMILIES:
        assert other_vits(hosts.model(family)) == [], family


# The proof can fail --------------------------------------------------------------------------


def assignment(plan, ending):
    return next(i for i, one in enumerate(plan.mapping.assignments) if one.spec.name.endswith(ending))


def swap_rows(plan):
    place = assignment(plan, "layers.1.mlp.experts.gate_up_proj")
    one = plan.mapping.assignments[place]
    plan.mapping.assignments[place] = replace(one, dense=one.dense[::-1])


def another_layers(plan):
    place, other = (assignment(plan, f"layers.{layer}.mlp.experts.down_proj") for layer in (1, 2))
    wrong = plan.mapping.assignments[other].dense
    plan.mapping.assignments[place] = replace(plan.mapping.assignments[place], dense=wrong)


def no_renorm(plan):
    """What is written says another routing than the plan: one that was asked for would be measured, not judged."""
    write_processor = plan.write_processor

    def write(folder):
        write_processor(folder)
        config = json.loads((folder / "config.json").read_text())
        config["text_moe"]["norm_topk_prob"] = config["text_config"]["norm_topk_prob"] = False
        (folder / "config.json").write_text(json.dumps(config))

    plan.write_processor = write


MUTANTS = {
    "gate and up swapped": (swap_rows, "layers.1.mlp on random input differs by"),
    "another layer's MLP": (another_layers, "layers.1.mlp on random input differs by"),
    "weights not renormalised": (no_renorm, "layers.0.mlp on random input differs by"),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_raises_when_a_host_is_changed(upcycled_host, tmp_path, name, leaves_nothing):
    change, message = MUTANTS[name]
    dense, _ = upcycled_host("qwen2_5_vl")
    plan = plan_upcycle(UpcycleArguments(vlm_model=str(dense), **host_options("qwen2_5_vl")))
    change(plan)
    with leaves_nothing(), pytest.raises(ProofError, match=message):
        write_proved(plan, tmp_path / "out", force=False)


def test_raises_when_one_expert_is_another(upcycled_host, tmp_path, monkeypatch, leaves_nothing):
    """Found although experts that were all given as one are read by the first."""
    dense, _ = upcycled_host("llava_next")
    plan = plan_upcycle(UpcycleArguments(vlm_model=str(dense), text_experts=4))
    whole = type(plan.mapping).blocks

    def wrong(mapping, drawing):
        def blocks(name):
            given = list(whole(mapping, drawing)(name))
            if name.endswith("layers.1.mlp.experts.down_proj"):
                given[2] = given[2].flip(0)
            return iter(given)

        return blocks

    with monkeypatch.context() as patched:
        patched.setattr(type(plan.mapping), "blocks", wrong)
        with leaves_nothing(), pytest.raises(ProofError, match=r"layers\.1\.mlp on random input differs by"):
            write_proved(plan, tmp_path / "out", force=False)
