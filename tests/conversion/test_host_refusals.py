"""What a host's VLM cannot be upcycled for is refused, and nothing is left behind."""

import json

import pytest
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoProcessor
from transformers.models.mistral.modeling_mistral import MistralDecoderLayer

from modeling_vlmoe import VLMoEConfig, VLMoEForConditionalGeneration
from modeling_vlmoe.conversion import ProofError, UpcycleArguments, upcycle
from modeling_vlmoe.conversion.planning import plan_upcycle
from modeling_vlmoe.conversion.upcycle import write_proved
from tests import hosts


@pytest.mark.parametrize(
    ("family", "asked", "message"),
    [
        ("gemma3", {"vision_revision": "v1"}, "--vision-revision v1 is given, but no --vision-model"),
        ("gemma3", {"connector_experts": 4}, r"no MLPs of a known layout between its ViT and its LLM; .*Gemma3Multi"),
        ("smolvlm", {"dense": True}, "--dense is given, but .* is a dense smolvlm already"),
        ("smolvlm", {"format": "native"}, "--format native writes LLaVA .* is a smolvlm, which stays"),
        ("smolvlm", {"vision_feature_layer": -1}, "--vision-feature-layer is given, but the connector of .*smolvlm"),
        ("llava_next", {"vision_experts": 2, "vision_layers": "3"}, "the connector reads the output of layer 2"),
        ("qwen2_vl", {"text_experts": 2, "text_layers": "7"}, "the text tower has 3"),
        ("qwen2_vl", {"text_experts": 2, "text_top_k": 3}, "num_experts_per_tok is 3, but there are 2 experts"),
    ],
    ids=str,
)
def test_raises_when_a_host_cannot_be_upcycled(upcycled_host, tmp_path, family, asked, message, leaves_nothing):
    dense, _ = upcycled_host(family)
    with leaves_nothing(), pytest.raises(ValueError, match=message):
        upcycle(UpcycleArguments(vlm_model=str(dense), output_dir=str(tmp_path / "out"), **asked))


def break_weights(folder):
    state = load_file(folder / "model.safetensors")
    state[next(name for name in state if name.endswith("layers.1.mlp.down_proj.weight"))][0, 0] = float("nan")
    save_file(state, folder / "model.safetensors", {"format": "pt"})


def change_the_image_token(folder):
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | {"image_token_id": 7, "image_token_index": 7}))


def leave_an_adapter(folder):
    (folder / "config.json").rename(folder / "adapter_config.json")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (break_weights, r"gives no numbers \(NaN\) as logits of a picture and text: its weights are broken"),
        (change_the_image_token, "dense cannot be run, as it is, with its own processor, on vlm: .*Mend or replace"),
        (leave_an_adapter, "dense is an adapter of PEFT, without the model. Merge it"),
    ],
)
def test_raises_when_a_parent_is_broken(tmp_path, change, message, leaves_nothing):
    dense = hosts.save(tmp_path / "dense", "llava_next")
    change(dense)
    with leaves_nothing(), pytest.raises(ValueError, match=message):
        upcycle(UpcycleArguments(vlm_model=str(dense), output_dir=str(tmp_path / "out"), text_experts=2))


def test_raises_when_the_llm_is_sparse_already(tmp_path, leaves_nothing):
    folder = tmp_path / "dense"
    AutoConfig.for_model("qwen3_vl_moe").save_pretrained(folder)
    with leaves_nothing(), pytest.raises(ValueError, match="whose LLM is already sparse: its qwen3_vl_moe_text"):
        upcycle(UpcycleArguments(vlm_model=str(folder), output_dir=str(tmp_path / "out")))


def test_raises_when_it_is_sparse_in_place_already(upcycled_host, tmp_path, leaves_nothing):
    _, sparse = upcycled_host("smolvlm")
    with leaves_nothing(), pytest.raises(ValueError, match="its text part is already sparse \\(4 experts\\)"):
        upcycle(UpcycleArguments(vlm_model=str(sparse), output_dir=str(tmp_path / "out")))


def test_raises_when_there_is_no_processor(tmp_path, leaves_nothing):
    folder = tmp_path / "dense"
    hosts.model("llava_next").save_pretrained(folder)
    with leaves_nothing(), pytest.raises(ValueError, match="has no processor that can be loaded"):
        upcycle(UpcycleArguments(vlm_model=str(folder), output_dir=str(tmp_path / "out")))


def test_a_processor_that_no_file_names_is_named(tmp_path):
    """Its class is found by the parent's model type, which what is written has no more."""
    dense = hosts.save(tmp_path / "dense", "llava_next")
    for file in (dense / "processor_config.json", dense / "tokenizer_config.json"):
        values = json.loads(file.read_text())
        values.pop("processor_class", None)
        file.write_text(json.dumps(values))
    out = upcycle(UpcycleArguments(vlm_model=str(dense), output_dir=str(tmp_path / "out"), text_experts=2))
    assert type(AutoProcessor.from_pretrained(dense)) is type(AutoProcessor.from_pretrained(out))


@pytest.mark.parametrize("is_apart", [False, True], ids=["processor_config", "preprocessor_config"])
def test_raises_when_no_file_names_the_image_processor(tmp_path, is_apart, leaves_nothing):
    """transformers finds it by the dense model's type; what is written has another."""
    dense = hosts.save(tmp_path / "dense", "llava_next")
    values = json.loads((dense / "processor_config.json").read_text())
    values["image_processor"].pop("image_processor_type")
    named = "processor_config.json, under 'image_processor',"
    if is_apart:
        named = "preprocessor_config.json"
        (dense / named).write_text(json.dumps(values.pop("image_processor")))
    (dense / "processor_config.json").write_text(json.dumps(values))
    message = f'{dense}/{named} has no image_processor_type.*Add "image_processor_type": "LlavaNextImageProcessor"'
    with leaves_nothing(), pytest.raises(ValueError, match=message):
        upcycle(UpcycleArguments(vlm_model=str(dense), output_dir=str(tmp_path / "out"), text_experts=2))


def test_raises_when_an_mlp_does_not_run_in_the_dense_model(upcycled_host, tmp_path, monkeypatch, leaves_nothing):
    dense, _ = upcycled_host("llava_next")
    plan = plan_upcycle(UpcycleArguments(vlm_model=str(dense), text_experts=4))
    monkeypatch.setattr(MistralDecoderLayer, "forward", skip_the_second(MistralDecoderLayer.forward))
    with leaves_nothing(), pytest.raises(ProofError, match=r"layers\.1\.mlp does not run in the dense model .* Leave"):
        write_proved(plan, tmp_path / "out", force=False)


def skip_the_second(forward):
    def maybe(layer, hidden_states, *args, **kwargs):
        if layer.self_attn.layer_idx == 1:
            return hidden_states
        return forward(layer, hidden_states, *args, **kwargs)

    return maybe


def test_raises_when_a_hosts_configuration_is_taken_for_a_composites(upcycled_host):
    _, sparse = upcycled_host("llava_next")
    config = AutoConfig.from_pretrained(sparse)
    with pytest.raises(ValueError, match=r"of a llava_next that is sparse in place\. Make it by VLMoEConfig"):
        VLMoEConfig(**config.to_dict())
    with pytest.raises(ValueError, match=r"Build it by AutoModelForImageTextToText\.from_config"):
        VLMoEForConditionalGeneration(config)
    assert "image_hidden_states" in config.keys_to_ignore_at_inference
