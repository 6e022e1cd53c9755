import copy
import io
import pickle
import subprocess
import sys

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText

from modeling_vlmoe import (
    VLMoEConfig,
    VLMoEForConditionalGeneration,
    VLMoEForSequenceClassification,
    VLMoEModel,
)
from tests import tiny
from tests.models import ALL_SPARSE, EXPERTS, IMAGE_TOKEN, PAIRS, batch, gap, single, sparse_config, sparse_model


@pytest.fixture(scope="module")
def parents(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parents")
    for family in tiny.TEXT_FAMILIES:
        tiny.save_text_parent(folder / family, family)
    for family in tiny.VISION_FAMILIES:
        tiny.save_vision_parent(folder / family, family)
        tiny.save_vision_parent(folder / f"whole-{family}", family, whole=True)
    return folder


def upcycled(parents, text, vision, **fields):
    return VLMoEForConditionalGeneration.from_vision_text_pretrained(
        str(parents / vision), str(parents / text), **(ALL_SPARSE | {"image_token_id": IMAGE_TOKEN} | fields)
    )


@pytest.mark.parametrize(("text", "vision"), PAIRS)
@torch.no_grad()
def test_upcycled_in_memory_gives_the_parents_logits_and_features(parents, text, vision):
    model = upcycled(parents, text, vision)
    dense = AutoModelForCausalLM.from_pretrained(parents / text)
    ids = torch.randint(6, 290, (2, 11))
    assert gap(model(ids).logits, dense(ids).logits) <= 1e-5
    vit, pixels = AutoModel.from_pretrained(parents / vision), torch.randn(2, 3, tiny.IMAGE_SIZE, tiny.IMAGE_SIZE)
    wanted = vit(pixels, output_hidden_states=True)
    found = model.model.vision_tower(pixels, output_hidden_states=True)
    assert gap(found.last_hidden_state, wanted.last_hidden_state) <= 1e-5
    assert gap(found.hidden_states[-2], wanted.hidden_states[-2]) <= 1e-5


@pytest.mark.parametrize("vision", tiny.VISION_FAMILIES)
@torch.no_grad()
def test_a_vit_inside_a_whole_checkpoint_is_a_parent_too(parents, vision):
    model = upcycled(parents, "llama", f"whole-{vision}")
    whole = AutoModel.from_pretrained(parents / f"whole-{vision}")
    pixels = torch.randn(2, 3, tiny.IMAGE_SIZE, tiny.IMAGE_SIZE)
    found, wanted = model.model.vision_tower(pixels), whole.vision_model(pixels)
    assert gap(found.last_hidden_state, wanted.last_hidden_state) <= 1e-5


def test_upcycled_in_memory_saves_and_loads(parents, tmp_path):
    model = upcycled(parents, "qwen3", "siglip")
    model.save_pretrained(tmp_path)
    again, info = AutoModelForImageTextToText.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    inputs = batch()
    torch.testing.assert_close(again(**inputs).logits, model(**inputs).logits, atol=0, rtol=0)


def test_raises_when_the_llm_parent_is_sparse_already(parents, tmp_path):
    sizes = {k: v for k, v in tiny.TEXT_FIELDS.items() if k != "tie_word_embeddings"}
    from transformers import AutoConfig

    AutoModelForCausalLM.from_config(AutoConfig.for_model("mixtral", num_local_experts=2, **sizes)).save_pretrained(
        tmp_path
    )
    with pytest.raises(ValueError, match="is a mixtral, which is sparse already"):
        upcycled(parents, tmp_path, "siglip")


@pytest.mark.parametrize(
    "sparse_parts", [(), ("text",), ("vision",), ("connector",), ("text", "vision", "connector")], ids=str
)
def test_each_part_is_dense_or_sparse_and_reloads_bit_equal(tmp_path, sparse_parts):
    model = sparse_model(
        **{f"{part}_moe": EXPERTS if part in sparse_parts else None for part in ("text", "vision", "connector")}
    )
    inputs = batch((1, 2))
    out = model(**inputs, output_router_logits=True)
    assert (out.router_logits is not None) == ("text" in sparse_parts)
    assert (out.vision_router_logits is not None) == ("vision" in sparse_parts)
    assert (out.connector_router_logits is not None) == ("connector" in sparse_parts)
    model.save_pretrained(tmp_path)
    again, info = AutoModelForImageTextToText.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    torch.testing.assert_close(again(**inputs).logits, out.logits, atol=0, rtol=0)


def test_router_logits_have_one_row_per_token_of_their_tower():
    out = sparse_model()(**batch((1, 2)), output_router_logits=True)
    length = batch((1, 2))["input_ids"].numel()
    assert [tuple(z.shape) for z in out.router_logits] == [(length, 4)] * 3
    assert [tuple(z.shape) for z in out.vision_router_logits] == [(3 * tiny.NUM_PATCHES, 4)] * 2
    assert [tuple(z.shape) for z in out.connector_router_logits] == [(3 * tiny.NUM_PATCHES, 4)]
    assert all(z.dtype == torch.float32 and not z.requires_grad for z in out.router_logits)


@pytest.mark.parametrize("padding_side", ["left", "right"])
@pytest.mark.parametrize("num_images", [(0, 0), (1, 1), (2, 1), (0, 2), (3, 0, 1)], ids=str)
@torch.no_grad()
def test_a_padded_batch_gives_the_logits_of_its_singles(num_images, padding_side):
    model, inputs = sparse_model(), batch(num_images, padding_side=padding_side)
    logits = model(**inputs).logits
    for row in range(len(num_images)):
        real = inputs["attention_mask"][row].bool()
        assert gap(logits[row, real], model(**single(inputs, num_images, row)).logits[0]) <= 1e-4


def test_kernels_agree_in_logits_and_gradients():
    model, inputs = sparse_model(), batch((1, 2))
    found = {}
    for name in ("eager", "batched_mm", "grouped_mm"):
        model.set_experts_implementation(name)
        assert model.model.language_model.config._experts_implementation == name
        assert model.model.vision_tower.config._experts_implementation == name
        model.zero_grad()
        out = model(**inputs, labels=inputs["input_ids"])
        out.loss.backward()
        found[name] = (out.logits, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    for name in ("batched_mm", "grouped_mm"):
        assert gap(found[name][0], found["eager"][0]) <= 1e-5
        for parameter, gradient in found["eager"][1].items():
            torch.testing.assert_close(found[name][1][parameter], gradient, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("requested", ["eager", "batched_mm", "grouped_mm", None])
def test_the_requested_kernel_reaches_every_sparse_part(tmp_path, requested):
    sparse_model(vision_moe=None).save_pretrained(tmp_path)  # a dense part would refuse a kernel for experts
    kwargs = {} if requested is None else {"experts_implementation": requested}
    model = AutoModelForImageTextToText.from_pretrained(tmp_path, **kwargs)
    assert model.model.language_model.config._experts_implementation == (requested or "grouped_mm")
    assert model.config._experts_implementation == (requested or "grouped_mm")


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_changes_nothing(use_reentrant):
    model, inputs = sparse_model().train(), batch((1, 2))
    inputs["labels"] = inputs["input_ids"]
    model.enable_input_require_grads()
    plain = model(**inputs)
    plain.loss.backward()
    wanted = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    model.activation_checkpointing_enable({"use_reentrant": use_reentrant})
    again = model(**inputs, use_cache=False)
    again.loss.backward()
    assert again.loss == plain.loss
    torch.testing.assert_close(again.aux_loss, plain.aux_loss, atol=0, rtol=0)
    for name, gradient in wanted.items():
        torch.testing.assert_close(model.get_parameter(name).grad, gradient, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("how", ["from_pretrained", "from_config", "to", "autocast"])
def test_router_logits_are_float32(tmp_path, how):
    model = sparse_model()
    if how == "from_pretrained":
        model.save_pretrained(tmp_path)
        model = AutoModelForImageTextToText.from_pretrained(tmp_path, dtype=torch.bfloat16)
        assert model.model.language_model.layers[0].mlp.router.weight.dtype == torch.float32
        assert model.model.language_model.layers[0].mlp.experts.down_proj.dtype == torch.bfloat16
    elif how == "from_config":
        model = AutoModelForImageTextToText.from_config(sparse_config(), dtype=torch.bfloat16)
    elif how == "to":
        model = model.to(torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=how == "autocast"):
        out = model(**batch(), output_router_logits=True)
    for logits in (*out.router_logits, *out.vision_router_logits, *out.connector_router_logits):
        assert logits.dtype == torch.float32
        assert not torch.equal(logits, logits.bfloat16().float())


def test_initialisation_leaves_no_raw_memory():
    model = VLMoEForConditionalGeneration(sparse_config())
    block = model.model.language_model.layers[0].mlp
    assert 0.015 < block.experts.gate_up_proj.std() < 0.025
    bound = 32**-0.5
    assert block.router.weight.abs().max() <= bound < 1.2 * block.router.weight.abs().max()
    vision = model.model.vision_tower.encoder.layers[1].mlp
    assert vision.experts.up_proj_bias.abs().max() == 0
    assert vision.experts.down_proj.std() > 0.01
    assert 0.015 < model.model.connector.mlp.experts.down_proj.std() < 0.025


def reloaded(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize(
    "again", [copy.deepcopy, reloaded, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "save", "pickle"]
)
def test_copies_of_the_object_compute_the_same(again):
    model, inputs = sparse_model(), batch()
    wanted = model(**inputs, output_router_logits=True)
    twin = again(model)
    found = twin(**inputs, output_router_logits=True)
    torch.testing.assert_close(found.logits, wanted.logits, atol=0, rtol=0)
    assert len(found.router_logits) == len(wanted.router_logits) == 3
    assert type(twin.model.language_model) is type(model.model.language_model)
    after = model(**inputs, output_router_logits=True, output_hidden_states=True)
    assert len(after.router_logits) == 3
    assert len(after.hidden_states) == 4


def test_a_pickled_model_records_in_a_new_process(tmp_path):
    model, inputs = sparse_model(), batch()
    with open(tmp_path / "model.pkl", "wb") as file:
        pickle.dump((model, inputs, model(**inputs).logits.detach()), file)
    code = (
        f"import pickle, torch; model, inputs, wanted = pickle.load(open({str(tmp_path / 'model.pkl')!r}, 'rb'))\n"
        "out = model(**inputs, output_router_logits=True)\n"
        "assert torch.equal(out.logits, wanted) and len(out.router_logits) == 3 and len(out.vision_router_logits) == 2"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def test_recording_is_not_doubled_whichever_part_ran_first():
    model, inputs = sparse_model(), batch()
    wanted = model(**inputs).logits
    model.model.vision_tower(inputs["pixel_values"], output_hidden_states=True)
    model.model(**inputs, output_router_logits=True)
    out = model(**inputs, output_router_logits=True, output_hidden_states=True)
    torch.testing.assert_close(out.logits, wanted, atol=0, rtol=0)
    assert (len(out.router_logits), len(out.hidden_states)) == (3, 4)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
def test_compiles_without_a_graph_break(backend, training):
    model, inputs = sparse_model().train(training), batch()
    inputs["labels"] = inputs["input_ids"]
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    out = compiled(**inputs)  # the first call of all: nothing may need an eager call before
    wanted = model(**inputs)
    assert gap(out.logits, wanted.logits) <= 1e-4
    if training:
        out.loss.backward()
        found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        model.zero_grad()
        wanted.loss.backward()
        for name, gradient in found.items():
            torch.testing.assert_close(gradient, model.get_parameter(name).grad, atol=1e-5, rtol=1e-4)


def test_the_head_repeats_what_the_dense_llm_does_to_its_logits():
    model, inputs = sparse_model(), batch()
    plain = model(**inputs).logits
    model.config.text_config.final_logit_softcapping = 3.0
    torch.testing.assert_close(model(**inputs).logits, torch.tanh(plain / 3) * 3)


def test_embeddings_can_be_resized():
    model = sparse_model()
    model.resize_token_embeddings(330)
    assert model(**batch()).logits.shape[-1] == 330
    assert model.config.text_config.vocab_size == 330


def test_tied_embeddings_stay_tied(tmp_path):
    config = sparse_config()
    config.text_config.tie_word_embeddings = config.tie_word_embeddings = True
    model = VLMoEForConditionalGeneration(config)
    assert model.lm_head.weight is model.model.language_model.embed_tokens.weight
    model.save_pretrained(tmp_path)
    again = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert again.lm_head.weight is again.model.language_model.embed_tokens.weight


def test_only_kept_positions_get_logits():
    model, inputs = sparse_model(), batch()
    full = model(**inputs).logits
    torch.testing.assert_close(model(**inputs, logits_to_keep=2).logits, full[:, -2:], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"pixel_values": None, "mm_encoder_outputs": None, "inputs_embeds": torch.zeros(2, 3, 32)},
            "exactly one of input_ids",
        ),
        ({"pixel_values": torch.zeros(1, 3, 24, 24)}, "holds 18 image tokens .* but the images give 9 features"),
    ],
)
def test_raises_when_inputs_do_not_fit(change, message):
    with pytest.raises(ValueError, match=message):
        sparse_model()(**(batch() | change))


def test_raises_when_the_image_token_is_not_known():
    with pytest.raises(ValueError, match="image_token_id is not set"):
        sparse_model(image_token_id=None)(**batch())


def test_raises_when_images_come_twice():
    model, inputs = sparse_model(), batch()
    encoded = model.get_image_features(inputs["pixel_values"])
    with pytest.raises(ValueError, match="Images came twice"):
        model(**inputs, mm_encoder_outputs={"image": encoded})


def test_raises_when_a_sparse_tower_is_saved_alone(tmp_path):
    with pytest.raises(ValueError, match="cannot be saved alone"):
        sparse_model().model.language_model.save_pretrained(tmp_path)


@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_sequence_classification_reads_the_last_token(tmp_path, padding_side):
    config = sparse_config(num_labels=3)
    model = tiny.redraw(VLMoEForSequenceClassification(config)).eval()
    inputs = batch((1, 2), padding_side=padding_side)
    logits = model(**inputs).logits
    assert logits.shape == (2, 3)
    for row in range(2):
        assert gap(logits[row], model(**single(inputs, (1, 2), row)).logits[0]) <= 1e-4
    model.save_pretrained(tmp_path)
    again = VLMoEForSequenceClassification.from_pretrained(tmp_path)
    torch.testing.assert_close(again(**inputs).logits, logits, atol=0, rtol=0)
    out = model.train()(**inputs, labels=torch.tensor([0, 2]))
    out.loss.backward()
    assert model.model.language_model.layers[0].mlp.router.weight.grad.abs().sum() > 0


def test_the_base_model_takes_what_the_head_takes():
    model, inputs = sparse_model(), batch()
    base = model.model(**inputs)
    assert isinstance(model.model, VLMoEModel)
    torch.testing.assert_close(model.lm_head(base.last_hidden_state), model(**inputs).logits)


@pytest.mark.parametrize("feature_layer", [0, [0], -1, [1, -2], -5], ids=str)
def test_every_feature_layer_that_passes_validation_is_read(feature_layer):
    config = sparse_config(vision_moe=None, vision_feature_layer=feature_layer)
    model = tiny.redraw(VLMoEForConditionalGeneration(config)).eval()
    inputs = batch((1, 2))
    hidden = model.model.vision_tower(inputs["pixel_values"], output_hidden_states=True).hidden_states
    layers = [feature_layer] if isinstance(feature_layer, int) else feature_layer
    wanted, _, _ = model.model.connector(torch.cat([hidden[layer] for layer in layers], dim=-1))
    found = torch.stack(model.get_image_features(inputs["pixel_values"]).pooler_output)
    torch.testing.assert_close(found, wanted, atol=0, rtol=0)
    assert model(**inputs).logits.isfinite().all()


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
def test_widths_that_no_kernel_likes_work_all_the_same(implementation):
    odd = {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 17}
    parts = {"text_moe": odd, "vision_moe": EXPERTS, "connector_moe": odd}
    vision = tiny.vision_config("siglip", hidden_size=22, intermediate_size=37)
    config = VLMoEConfig(
        text_config=tiny.text_config("llama"), vision_config=vision, image_token_id=IMAGE_TOKEN, **parts
    )
    model, inputs = tiny.redraw(VLMoEForConditionalGeneration(config)).eval(), batch((1, 2))
    wanted = model(**inputs).logits
    model.set_experts_implementation(implementation)
    assert gap(model(**inputs).logits, wanted) <= 1e-5


def test_parents_of_unlike_precision_reload_as_they_were(parents, tmp_path):
    tiny.save_text_parent(tmp_path / "llm", "llama", dtype=torch.bfloat16)
    model = upcycled(parents, tmp_path / "llm", "siglip")
    model.save_pretrained(tmp_path / "saved")
    again = AutoModelForImageTextToText.from_pretrained(tmp_path / "saved")
    assert again.model.language_model.dtype == again.model.vision_tower.dtype == torch.bfloat16
    torch.testing.assert_close(again(**batch()).logits, model(**batch()).logits, atol=0, rtol=0)


@pytest.mark.parametrize(
    ("vision", "fields", "message"),
    [
        ("llama", {}, "llama is a llama, which does not read images"),
        (
            "siglip",
            {"text_moe": {"moe_intermediate_size": 40}},
            "moe_intermediate_size is 40, but the dense MLP is 48 wide",
        ),
    ],
)
def test_raises_when_parents_cannot_be_upcycled_so(parents, vision, fields, message):
    with pytest.raises(ValueError, match=message):
        upcycled(parents, "llama", vision, **fields)


def test_raises_when_the_connectors_activation_is_unknown():
    with pytest.raises(ValueError, match="connector_hidden_act is 'foo'"):
        sparse_model(connector_hidden_act="foo")


def test_a_classifier_reports_its_routing():
    model = tiny.redraw(VLMoEForSequenceClassification(sparse_config(num_labels=3))).train()
    out = model(**batch(), labels=torch.tensor([0, 2]), output_router_logits=True)
    assert len(out.router_logits) == 3
    assert set(out.router_losses) == {"text", "vision", "connector"}


def test_raises_when_a_classifier_cannot_tell_padding():
    config = sparse_config(num_labels=3)
    config.text_config.pad_token_id = None
    model = VLMoEForSequenceClassification(config)
    with pytest.raises(ValueError, match="no padding known"):
        model(batch((0, 0))["input_ids"])
