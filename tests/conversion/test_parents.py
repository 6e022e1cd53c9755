"""What cannot be a parent is refused, with the reason."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from modeling_vlmoe.conversion import UpcycleArguments, upcycle
from modeling_vlmoe.conversion.planning import plan_upcycle
from modeling_vlmoe.mlp_layouts import LAYOUTS
from tests import tiny


def edit_json(file, **values):
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def edit_tensors(folder, edit):
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.fixture
def refuses(arguments, leaves_nothing):
    """Upcycling with these changes is refused with this message, and nothing is written."""

    def check(message, **changes):
        with leaves_nothing(), pytest.raises(ValueError, match=message):
            upcycle(arguments(**changes))

    return check


def test_raises_when_an_id_is_unknown_offline(refuses):
    refuses(
        "--text-model someone/no-such-model is neither a folder nor in the local Hub cache",
        text_model="someone/no-such-model",
    )


def test_raises_when_a_folder_is_not_there(refuses):
    refuses("there is no such folder, and it is no Hub id", vision_model="/no/such/folder")


def test_raises_when_a_parent_is_a_file(refuses, parents):
    refuses("is a file; expected a folder or a Hub id", text_model=parents / "llama" / "config.json")


def test_raises_when_a_revision_is_given_for_a_folder(refuses):
    refuses("--text-revision main is given, but .* is a folder", text_revision="main")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_raises_when_a_file_of_the_llm_is_missing(refuses, copied, name):
    text = copied("llama")
    (text / name).unlink()
    refuses("no tokenizer" if "tokenizer" in name else name, text_model=text)


def test_raises_when_the_image_processor_is_missing(refuses, copied):
    vision = copied("siglip")
    (vision / "preprocessor_config.json").unlink()
    refuses("has no image processor", vision_model=vision)


def test_raises_when_the_config_is_no_json(refuses, copied):
    text = copied("llama")
    (text / "config.json").write_text("{")
    refuses("config.json is not valid JSON", text_model=text)


def test_raises_when_the_config_names_no_type(refuses, copied):
    text = copied("llama")
    (text / "config.json").write_text("{}")
    refuses("config.json names no model_type", text_model=text)


def test_raises_when_the_type_is_unknown(refuses, copied):
    text = copied("llama")
    edit_json(text / "config.json", model_type="no_such_type")
    refuses("no_such_type", text_model=text)


def test_raises_when_weights_are_truncated(refuses, copied):
    text = copied("llama")
    file = text / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    refuses("model.safetensors is corrupt or truncated", text_model=text)


def test_raises_when_weights_are_pickled(refuses, copied):
    text = copied("llama")
    torch.save({}, text / "pytorch_model.bin")
    (text / "model.safetensors").unlink()
    refuses("only pickle weights", text_model=text)


def test_raises_when_a_parent_is_quantised(refuses, copied):
    text = copied("llama")
    edit_json(text / "config.json", quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})
    refuses("is quantised", text_model=text)


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_raises_when_the_llm_is_already_sparse(refuses, tmp_path_factory, family):
    folder = tmp_path_factory.mktemp("sparse")
    AutoConfig.for_model(family).save_pretrained(folder)
    refuses(f"is already sparse: its {family} configuration has num_", text_model=folder)


def test_raises_when_the_llm_is_a_vit(refuses, parents):
    refuses("is a siglip_vision_model model, which is not a causal LLM", text_model=parents / "siglip")


def test_raises_when_the_vit_is_an_llm(refuses, parents):
    refuses("is a llama model, which is not a ViT", vision_model=parents / "llama")


@pytest.mark.parametrize("family", tiny.TEXT_FAMILIES)
def test_raises_when_the_llm_has_no_vocabulary(refuses, copied, family):
    text = copied(family)
    (text / "tokenizer.json").unlink()
    refuses("has no tokenizer: expected a vocabulary file", text_model=text)
    (text / "tokenizer_config.json").unlink()
    refuses("has no tokenizer: expected a vocabulary file", text_model=text)


@pytest.mark.parametrize("family", tiny.TEXT_FAMILIES)
def test_raises_when_the_image_token_gets_the_id_of_a_word(refuses, copied, family):
    text = copied(family)
    content = json.loads((text / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary[max(vocabulary, key=vocabulary.get)] += 1  # a hole below it
    (text / "tokenizer.json").write_text(json.dumps(content))
    refuses("'<image>' got the id 295, which is that of .'Ġcolour'. too", text_model=text)


def test_embedding_rows_reach_the_largest_id_of_a_vocabulary_with_holes(tmp_path, arguments):
    tokenizer = tiny.tokenizer()
    tokenizer.add_tokens(["<image>"])
    text = tiny.save_text_parent(tmp_path / "text", "llama", vocab_size=len(tokenizer))
    tokenizer.save_pretrained(text)
    content = json.loads((text / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary[max(vocabulary, key=vocabulary.get)] = 400
    (text / "tokenizer.json").write_text(json.dumps(content))
    plan = plan_upcycle(arguments(text_model=text))
    assert plan.config.text_config.vocab_size == 401


@pytest.mark.parametrize(
    ("parent", "name", "auto_class"),
    [
        ("llama", "config.json", "AutoConfig"),
        ("llama", "tokenizer_config.json", "AutoTokenizer"),
        ("siglip", "preprocessor_config.json", "AutoImageProcessor"),
    ],
)
def test_a_parents_own_code_is_neither_run_nor_asked_for(arguments, copied, monkeypatch, parent, name, auto_class):
    monkeypatch.setattr("builtins.input", lambda *args: pytest.fail("asked whether to trust"))
    folder = copied(parent)
    value = "own.Own" if name != "tokenizer_config.json" else ["own.Own", "own.Own"]
    edit_json(folder / name, auto_map={auto_class: value, "AutoModelForCausalLM": "own.Own", "AutoModel": "own.Own"})
    (folder / "own.py").write_text("raise SystemExit('run')")
    plan = plan_upcycle(arguments(**{"text_model" if parent == "llama" else "vision_model": folder}))
    assert "own.Own" not in str(plan.config.to_dict())


@pytest.mark.parametrize(
    ("parent", "values"),
    [
        ("llama", {"hidden_size": "a"}),
        ("llama", {"hidden_size": None}),
        ("llama", {"hidden_act": "no_such_act"}),
        ("llama", {"rope_parameters": {"rope_type": "no_such_rope", "rope_theta": 1e4}}),
        ("llama", {"num_attention_heads": 0}),
        ("siglip", {"patch_size": 0}),
        ("siglip", {"hidden_act": "no_such_act"}),
        ("clip", {"hidden_size": -1}),
    ],
    ids=str,
)
def test_raises_when_the_config_describes_no_model(refuses, copied, parent, values):
    folder = copied(parent)
    edit_json(folder / "config.json", **values)
    refuses(f"{folder}/config.json ", **{"text_model" if parent == "llama" else "vision_model": folder})


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
@pytest.mark.parametrize(("content", "message"), [("null", "expected a JSON object"), ("{", "is not valid JSON")])
def test_raises_when_a_file_is_no_json_object(refuses, copied, name, content, message):
    text = copied("llama")
    (text / name).write_text(content)
    refuses(f"{text}/{name} .*{message}", text_model=text)


def test_raises_when_generation_settings_cannot_be_used(refuses, copied):
    text = copied("llama")
    edit_json(text / "generation_config.json", max_new_tokens=-5)
    refuses("generation_config.json cannot be used", text_model=text)


@pytest.mark.parametrize(
    "values",
    [{"size": {"height": 16, "width": 16}}, {"do_resize": False}, {"size": {"no": 3}}, {"image_mean": [0.5]}],
    ids=str,
)
@pytest.mark.parametrize("family", tiny.VISION_FAMILIES)
def test_raises_when_the_image_processor_is_not_the_vits(refuses, copied, family, values):
    vision = copied(family)
    crop = {"do_center_crop": False} if family == "clip" else {}
    edit_json(vision / "preprocessor_config.json", **crop, **values)
    refuses(
        f"The image processor of {vision} |{vision} has no image processor that can be loaded", vision_model=vision
    )


def test_a_chat_template_that_is_left_out_is_named(arguments, copied, caplog):
    text = copied("llama")
    (text / "additional_chat_templates").mkdir()
    (text / "additional_chat_templates" / "tool_use.jinja").write_text("{{ messages }}")
    plan_upcycle(arguments(text_model=text))
    assert "only the default is kept, not tool_use" in caplog.text


def test_raises_when_the_vit_has_no_known_mlp(refuses, copied, monkeypatch):
    monkeypatch.setattr("modeling_vlmoe.mlp_layouts.LAYOUTS", LAYOUTS[:1])
    said = r"SiglipVisionModel: encoder.layers.1 has no MLP that matches: .*\[fc1 \(24 to 40\), fc2 \(40 to 24\)\]"
    refuses(said, vision_model=copied("siglip"), vision_experts=4)


def test_raises_when_a_tower_has_no_list_of_layers(refuses, copied, monkeypatch):
    monkeypatch.setattr("modeling_vlmoe.towers.LAYER_LISTS", ("blocks",))
    refuses(r"SiglipVisionModel has no list of layers", vision_model=copied("siglip"), vision_experts=4)


def test_raises_when_a_tensor_is_missing(refuses, copied):
    text = copied("llama")
    edit_tensors(text, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))
    refuses(r"lacks tensors of LlamaForCausalLM: model.layers.1.mlp.up_proj.weight \(1 in all\)", text_model=text)


def test_raises_when_nobody_uses_a_tensor(refuses, copied):
    text = copied("llama")
    edit_tensors(text, lambda tensors: tensors.update({"model.layers.0.mlp.extra.weight": torch.ones(2)}))
    refuses("tensors that LlamaForCausalLM has no place for: model.layers.0.mlp.extra.weight", text_model=text)


def test_raises_when_a_tensor_has_another_shape(refuses, copied):
    text = copied("llama")
    edit_tensors(text, lambda tensors: tensors.update({"model.norm.weight": torch.ones(5)}))
    refuses(r"model.norm.weight has the shape \(5,\), but config.json makes it \(32,\)", text_model=text)


def test_raises_when_tied_tensors_differ(refuses, copied):
    text = copied("llama")
    edit_json(text / "config.json", tie_word_embeddings=True)
    refuses("stores two unlike tensors", text_model=text)


def test_a_tied_tensor_that_is_stored_twice_alike_is_dropped(arguments, copied):
    text = copied("llama")
    edit_json(text / "config.json", tie_word_embeddings=True)
    edit_tensors(
        text, lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"].clone()})
    )
    plan = plan_upcycle(arguments(text_model=text))
    assert plan.mapping.dropped["text"] == {"lm_head.weight": "tied to model.embed_tokens.weight"}


def test_what_a_whole_checkpoint_holds_beside_the_vit_is_dropped_by_name(tmp_path, arguments):
    whole = tiny.save_vision_parent(tmp_path / "whole", "clip", whole=True)
    dropped = plan_upcycle(arguments(vision_model=whole)).mapping.dropped["vision"]
    assert set(dropped.values()) == {"part of CLIPModel, not of CLIPVisionModel"}
    assert {"logit_scale", "text_projection.weight", "visual_projection.weight"} < set(dropped)
    assert not any(name.startswith("vision_model.") for name in dropped)


def test_raises_when_a_whole_checkpoint_holds_what_is_not_its_own(refuses, tmp_path_factory):
    whole = tiny.save_vision_parent(tmp_path_factory.mktemp("whole"), "siglip", whole=True)
    edit_tensors(whole, lambda tensors: tensors.update({"audio_model.weight": torch.ones(1)}))
    refuses("no place for: audio_model.weight", vision_model=whole)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"text_layers": "0,3", "text_experts": 4}, "text_moe.layers asks for layers .3., but the text tower has 3"),
        (
            {"vision_layers": "3", "vision_experts": 4},
            "vision_moe.layers asks for layers .3., but the connector reads the output of layer 2",
        ),
        ({"text_experts": 2, "text_top_k": 3}, "text_moe.num_experts_per_tok is 3, but there are 2 experts"),
        ({"connector_experts": 1}, "connector_moe.num_experts_per_tok is 2, but there are 1 experts"),
        ({"text_experts": 0}, "text_moe.num_experts is 0"),
        ({"vision_feature_layer": 9}, "vision_feature_layer is 9, but the vision tower has 4 layers"),
        (
            {"vision_feature_select_strategy": "cls"},
            "--vision-feature-select-strategy is cls; expected default or full",
        ),
        ({"vision_layers": "1"}, "--vision-layers is given, but this part stays dense"),
        ({"connector_top_k": 1, "text_experts": 4}, "--connector-top-k is given, but this part stays dense"),
        ({"expert_init": "magic"}, "--expert-init magic is not known; expected one of copy"),
        ({"router_init": "magic"}, "--router-init magic is not known; expected one of uniform"),
        ({"dtype": "int8"}, "--dtype int8 is not known"),
        ({"vision_model": None}, "Give --text-model and --vision-model, or --vlm-model alone; given: --text-model"),
        ({"vlm_model": "a/b"}, "or --vlm-model alone"),
        ({"output_dir": None}, "Give --output-dir"),
        ({"dense": True, "text_experts": 4}, "--dense gives no part experts, but --text-experts is given"),
        ({"dense": True, "vision_layers": "1"}, "--vision-layers is given, but this part stays dense"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else "",
)
def test_raises_when_settings_make_no_sense(refuses, changes, message):
    refuses(message, **changes)


def test_raises_when_the_vlm_parent_is_another_kind(refuses, parents):
    refuses(
        "is a llama model; expected a dense VLM that transformers registers",
        text_model=None,
        vision_model=None,
        vlm_model=parents / "llama",
    )


def test_raises_when_a_part_of_the_vlm_parent_is_already_sparse(refuses, upcycled):
    refuses(r"its text part is already sparse \(8 experts\)", text_model=None, vision_model=None, vlm_model=upcycled)


@pytest.fixture(scope="session")
def dense_vlm(parents, tmp_path_factory):
    """A dense Llama + SigLIP vlmoe model, to be read only."""
    out = tmp_path_factory.mktemp("dense") / "model"
    given = {"text_model": str(parents / "llama"), "vision_model": str(parents / "siglip")}
    return upcycle(UpcycleArguments(**given, output_dir=str(out), dense=True))


@pytest.mark.parametrize(
    ("name", "edit", "message"),
    [
        (
            "processor_config.json",
            lambda values: values.update(num_image_tokens=7),
            "has num_image_tokens 7, but its ViT makes 9",
        ),
        (
            "processor_config.json",
            lambda values: values["image_processor"].update(size={"height": 16, "width": 16}),
            r"makes pixel values \(1, 3, 16, 16\) of a picture, which the ViT, a SiglipVisionModel for images of 24",
        ),
        (
            "config.json",
            lambda values: values.update(image_token_id=5),
            "has image_token_id 5, but its tokenizer's <image> is 295",
        ),
    ],
    ids=["features", "size", "token"],
)
def test_raises_when_a_vlm_parent_contradicts_itself(refuses, dense_vlm, tmp_path_factory, name, edit, message):
    folder = Path(shutil.copytree(dense_vlm, tmp_path_factory.mktemp("vlm") / "model"))
    values = json.loads((folder / name).read_text())
    edit(values)
    (folder / name).write_text(json.dumps(values))
    refuses(message, text_model=None, vision_model=None, vlm_model=folder)


def test_raises_when_a_vlmoe_model_is_given_as_llm(refuses, upcycled):
    refuses("is a vlmoe model; give a dense one as --vlm-model", text_model=upcycled)


def test_raises_when_the_output_would_overwrite_a_parent(arguments, copied):
    text = copied("llama")
    with pytest.raises(ValueError, match=r"would be overwritten"):
        upcycle(arguments(text_model=text, output_dir=text, force=True))
    assert AutoModelForCausalLM.from_pretrained(text)


def test_raises_when_a_parents_weights_are_links_into_the_output(arguments, copied, tmp_path):
    text = copied("llama")
    out = Path(shutil.move(text, tmp_path / "out"))
    text.mkdir()
    for file in out.iterdir():
        (text / file.name).symlink_to(file)
    with pytest.raises(ValueError, match=r"is or holds the parent .*, which would be overwritten"):
        upcycle(arguments(text_model=text, output_dir=out, force=True))
    assert AutoModelForCausalLM.from_pretrained(out)


def test_a_parent_in_the_hub_cache_is_found_offline_with_its_commit(parents, tmp_path, monkeypatch):
    commit = "0123456789abcdef0123456789abcdef01234567"
    cache = tmp_path / "cache"
    for role, source in (("text", "llama"), ("vision", "siglip")):
        repo = cache / f"models--someone--{role}"
        shutil.copytree(parents / source, repo / "snapshots" / commit)
        (repo / "refs").mkdir()
        (repo / "refs" / "main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    args = UpcycleArguments(text_model="someone/text", vision_model="someone/vision", output_dir=str(tmp_path / "out"))
    receipt = json.loads((upcycle(args) / "upcycle_receipt.json").read_text())
    assert {role: (parent["name"], parent["revision"]) for role, parent in receipt["parents"].items()} == {
        "text": ("someone/text", commit),
        "vision": ("someone/vision", commit),
    }
