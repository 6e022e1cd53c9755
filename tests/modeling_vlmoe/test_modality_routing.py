"""Routing by modality in the LLM: no token reaches an expert that is closed to it, however the model is run."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.nn.functional import linear
from transformers import AutoModelForImageTextToText, DynamicCache
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from modeling_vlmoe import VLMoEConfig, VLMoEForSequenceClassification
from modeling_vlmoe.conversion.backbones.tiny_vlms import tiny_vlm_config
from modeling_vlmoe.finetune import lora_config
from modeling_vlmoe.modality_routing import open_to
from modeling_vlmoe.moe_config import MoEConfig
from modeling_vlmoe.router_losses import RouterContext, balance_by_modality
from modeling_vlmoe.routers import Router
from modeling_vlmoe.towers import sparse_blocks
from tests import tiny
from tests.conformance.oracle import MicroBatch, losses_of
from tests.modeling_vlmoe.test_combinations import VISION
from tests.modeling_vlmoe.test_combinations import inputs as combined_inputs
from tests.modeling_vlmoe.test_combinations import model as combined
from tests.modeling_vlmoe.test_in_place import given
from tests.modeling_vlmoe.test_in_place import model as hosted
from tests.models import EXPERTS, IMAGE_TOKEN, batch, gap, sparse_config, sparse_model

SIX = {"num_experts": 6, "num_experts_per_tok": 2}
KINDS = {
    "per_modality_balance": SIX | {"modality_routing": "per_modality_balance"},
    "intra_inter": SIX | {"modality_routing": "intra_inter", "modality_experts": [1, 2, 3]},
    "isolated": SIX | {"modality_routing": "isolated", "modality_experts": [2, 4, 0]},
}
POOLED = ["intra_inter", "isolated"]
KEPT = {"max_new_tokens": 5, "min_new_tokens": 5, "pad_token_id": 0, "do_sample": False}
LIMIT = 1e-5


def model(kind, **fields):
    return sparse_model(text_moe=KINDS[kind] | fields)


def flags(inputs):
    return (inputs["input_ids"] == IMAGE_TOKEN).reshape(-1)


def chosen(made, run):
    """What each of the LLM's routers was given and chose while something runs: lists of (is_image, experts)."""
    found, handles = [], []

    def note(router, args, output):
        found.append((args[1].is_image_token(), output[2]))

    for path, block in sparse_blocks(made):
        if "language_model" in path or "text_model" in path:
            handles.append(block.router.register_forward_hook(note))
    run()
    for handle in handles:
        handle.remove()
    return found


def check_open(made, found):
    """Every token's experts are open to it; both kinds of tokens were there."""
    moe = made.config.text_moe
    for is_image, experts in found:
        for modality, own in (("image", is_image), ("text", ~is_image)):
            assert set(experts[own].flatten().tolist()) <= set(open_to(moe, modality))
    assert any(is_image.any() for is_image, _ in found)
    assert any((~is_image).any() for is_image, _ in found)


# The router


def router(kind, width=8, **fields):
    moe = MoEConfig(**(KINDS[kind] | fields))
    made = Router(width, moe)
    made.reset_parameters()
    return made


def context(is_image):
    return RouterContext(learns=False, is_image=is_image)


@pytest.mark.parametrize("norm", [None, 2.0])
@pytest.mark.parametrize("router_type", ["softmax", "sigmoid"])
@pytest.mark.parametrize("kind", POOLED)
def test_a_router_is_the_plain_loop_over_open_experts(kind, router_type, norm):
    torch.manual_seed(0)
    made = router(kind, router_type=router_type, router_logit_norm=norm)
    x, is_image = torch.randn(10, 8), torch.arange(10) % 3 == 0
    logits, weights, experts = made(x, context(is_image[None]))
    for token in range(10):
        modality = "image" if is_image[token] else "text"
        own = made.image_weight if is_image[token] and kind == "intra_inter" else made.weight
        open_ = open_to(made.moe, modality)
        z = linear(x[token], own)[open_]
        if norm is not None:
            z = norm * (z - z.mean()) / z.std(unbiased=False)
        torch.testing.assert_close(logits[token, open_], z, rtol=1e-5, atol=1e-5)
        closed = [expert for expert in range(6) if expert not in open_]
        assert (logits[token, closed] == torch.finfo(torch.float32).min).all()
        p = z.sigmoid() if router_type == "sigmoid" else z.softmax(-1)
        weight, index = p.topk(2)
        assert [open_[one] for one in index] == experts[token].tolist()
        torch.testing.assert_close(weights[token], weight / weight.sum())


@pytest.mark.parametrize("router_type", ["softmax", "sigmoid"])
def test_a_closed_expert_is_not_chosen_where_open_scores_underflow(router_type):
    made = router("isolated", router_type=router_type)
    with torch.no_grad():
        made.weight.zero_()
        made.weight[:, 0] = torch.tensor([-300.0, -900, 300, -300, -900, -1500])
    x = torch.zeros(2, 8)
    x[:, 0] = 1
    _, weights, experts = made(x, context(torch.tensor([[True, False]])))
    assert set(experts[0].tolist()) == {0, 1}
    assert set(experts[1].tolist()) <= {2, 3, 4, 5}
    assert weights.isfinite().all()


def test_raises_when_nobody_says_which_tokens_are_of_images():
    made = router("isolated")
    for given_context in (None, RouterContext()):
        with pytest.raises(ValueError, match=r"'isolated', but the router was not told.*Use the whole"):
            made(torch.randn(3, 8), given_context)
    with pytest.raises(ValueError, match=r"reads 3 tokens where the model was given 2.*choose"):
        made(torch.randn(3, 8), context(torch.zeros(1, 2, dtype=torch.bool)))


# Losses


def test_balance_is_one_of_each_modality_when_its_routing_is_uniform():
    moe = MoEConfig(**KINDS["isolated"])
    is_image = torch.tensor([True, True, False, False, False, False])
    index = torch.tensor([[0, 1], [1, 0], [2, 3], [4, 5], [2, 3], [4, 5]])
    p = torch.tensor([[0.5, 0.5, 0, 0, 0, 0]] * 2 + [[0, 0, 0.25, 0.25, 0.25, 0.25]] * 4)
    for mask in (torch.ones(6), torch.tensor([1.0, 1, 1, 1, 0, 0]), torch.tensor([0.0, 0, 1, 1, 0, 0])):
        assert balance_by_modality(moe, p, index, mask, is_image).item() == pytest.approx(1.0)
    assert balance_by_modality(moe, p, index, torch.zeros(6), is_image) == 0


def test_balance_by_modality_sees_what_the_pooled_one_does_not():
    """Images on one half of the experts, text on the other: even together, and not in either."""
    moe = MoEConfig(num_experts=4, modality_routing="per_modality_balance")
    is_image = torch.arange(8) < 4
    p = torch.zeros(8, 4)
    p[:4, :2] = p[4:, 2:] = 0.5
    index = torch.where(is_image[:, None], torch.tensor([[0, 1]]), torch.tensor([[2, 3]]))
    assert balance_by_modality(moe, p, index, torch.ones(8), is_image).item() == pytest.approx(2.0)


@pytest.mark.parametrize("checkpointing", [None, False, True], ids=["plain", "non-reentrant", "reentrant"])
@pytest.mark.parametrize("kind", KINDS)
def test_losses_reach_the_routers_as_plain_loops_say(kind, checkpointing):
    inputs, gradients = batch((2, 0, 1)), []
    for weights in ((0.0, 0.0), (0.3, 0.02)):
        made = model(kind, router_aux_loss_coef=weights[0], router_z_loss_coef=weights[1]).train()
        for moe in (made.config.vision_moe, made.config.connector_moe):
            moe.router_aux_loss_coef, moe.router_z_loss_coef = weights
        if checkpointing is not None:
            made.activation_checkpointing_enable({"use_reentrant": checkpointing})
        outputs = made(**inputs, labels=inputs["input_ids"])
        outputs.loss.backward()
        gradients.append({name: one.grad for name, one in made.named_parameters() if ".router." in name})
    made.zero_grad()
    wanted = losses_of(made.eval().model, MicroBatch(inputs), weights)
    wanted.backward()
    assert outputs.aux_loss.item() == pytest.approx(wanted.item(), rel=1e-4)
    named = dict(made.named_parameters())
    for name, task in gradients[0].items():
        found = gradients[1][name] - task
        assert found.any()
        torch.testing.assert_close(found, named[name].grad, rtol=1e-3, atol=1e-6)
    assert any(name.endswith("image_weight") for name in named) == (kind == "intra_inter")


def test_text_alone_leaves_the_image_router_a_gradient_of_zero():
    """DDP waits for every parameter's."""
    made, inputs = model("intra_inter").train(), batch((0, 0))
    made(**inputs, labels=inputs["input_ids"]).loss.backward()
    mlp = made.model.language_model.layers[0].mlp.router
    assert mlp.weight.grad.any()
    assert mlp.image_weight.grad is not None
    assert not mlp.image_weight.grad.any()


@torch.no_grad()
@pytest.mark.parametrize("kind", POOLED)
def test_the_hosts_own_losses_on_the_outputs_are_finite(kind):
    inputs = batch((1, 2))
    logits = model(kind)(**inputs, output_router_logits=True).router_logits
    assert [one.shape for one in logits] == [(inputs["input_ids"].numel(), 6)] * 3
    for dtype in (torch.float32, torch.bfloat16):
        loss = load_balancing_loss_func(tuple(one.to(dtype) for one in logits), 6, 2, inputs["attention_mask"])
        assert loss.isfinite()


# The whole model


@torch.no_grad()
@pytest.mark.parametrize("kind", POOLED)
def test_no_token_reaches_a_closed_expert(kind):
    made, inputs = model(kind), batch((2, 0, 1))
    check_open(made, chosen(made, lambda: made(**inputs)))
    lowest = torch.finfo(torch.float32).min
    for logits in made(**inputs, output_router_logits=True).router_logits:
        for modality, own in (("image", flags(inputs)), ("text", ~flags(inputs))):
            is_open = torch.zeros(6, dtype=torch.bool)
            is_open[open_to(made.config.text_moe, modality)] = True
            assert torch.equal(logits[own] > lowest, is_open.expand(int(own.sum()), -1))


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_every_kernel_gives_the_same(kind):
    made, inputs = model(kind), batch((1, 2))
    real = inputs["attention_mask"].bool()
    found = []
    for kernel in ("eager", "batched_mm", "grouped_mm"):
        made.set_experts_implementation(kernel)
        found.append(made(**inputs).logits[real])
    assert gap(found[1], found[0]) <= LIMIT
    assert gap(found[2], found[0]) <= LIMIT


@torch.no_grad()
@pytest.mark.parametrize("kind", ["intra_inter", pytest.param("isolated", marks=pytest.mark.slow)])
def test_a_saved_model_comes_back_with_float32_routers(kind, tmp_path):
    made, inputs = model(kind), batch((1, 1))
    made.save_pretrained(tmp_path)
    again = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert again.config.text_moe == made.config.text_moe
    assert torch.equal(again(**inputs).logits, made(**inputs).logits)
    half = AutoModelForImageTextToText.from_pretrained(tmp_path, dtype=torch.bfloat16)
    routers = {name: one.dtype for name, one in half.named_parameters() if ".router." in name}
    assert set(routers.values()) == {torch.float32}
    assert half(**inputs).logits.isfinite().all()


@torch.no_grad()
@pytest.mark.parametrize("kind", ["intra_inter", pytest.param("isolated", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "kwargs",
    [{}, {"cache_implementation": "static"}, {"num_beams": 3}, {"use_cache": False}, {"prompt_lookup_num_tokens": 2}],
    ids=["greedy", "static_cache", "beams", "no_cache", "prompt_lookup"],
)
def test_generation_routes_by_modality(kind, kwargs):
    made, inputs = model(kind), batch((1,) if "prompt_lookup_num_tokens" in kwargs else (1, 2))
    tokens = []
    found = chosen(made, lambda: tokens.append(made.generate(**inputs, **(KEPT | kwargs))))
    check_open(made, found)
    if "num_beams" not in kwargs:  # by whole passes, token after token
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        for _ in range(KEPT["max_new_tokens"]):
            given_ = inputs | {"input_ids": ids, "attention_mask": mask}
            ids = torch.cat([ids, made(**given_).logits[:, -1].argmax(-1, keepdim=True)], dim=1)
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
        assert torch.equal(tokens[0], ids)


@torch.no_grad()
@pytest.mark.parametrize("kind", POOLED)
def test_decoding_is_the_whole_pass(kind):
    made, inputs = model(kind), batch((1,))
    whole = made(**inputs).logits
    cut = int(flags(inputs).nonzero()[0]) + 5  # within the image, so that features have to be given apart
    image = made.get_image_features(inputs["pixel_values"]).pooler_output[0]
    embeds = made.get_input_embeddings()(inputs["input_ids"])
    embeds[0, flags(inputs)] = image
    marks, cache, found = flags(inputs)[None].long(), DynamicCache(), []
    for piece in (slice(0, cut), slice(cut, None)):
        steps = {"inputs_embeds": embeds[:, piece], "mm_token_type_ids": marks[:, : piece.stop]}
        found.append(made(**steps, past_key_values=cache, use_cache=True).logits)
    assert gap(torch.cat(found, dim=1), whole) <= LIMIT


@torch.no_grad()
@pytest.mark.parametrize("kind", POOLED)
def test_embeddings_with_their_images_are_told_by_their_placeholders(kind):
    made, inputs = model(kind), batch((1, 2))
    real, ids = inputs["attention_mask"].bool(), inputs["input_ids"]
    wanted = made(**inputs).logits[real]
    given_ = {name: value for name, value in inputs.items() if name != "input_ids"}
    given_["inputs_embeds"] = made.get_input_embeddings()(ids)
    assert gap(made(**given_).logits[real], wanted) <= LIMIT
    assert torch.equal(made.generate(**given_, **KEPT), made.generate(**inputs, **KEPT)[:, ids.shape[1] :])


def test_raises_when_embeddings_may_hold_images_that_nobody_tells_of():
    made, ids = model("intra_inter"), batch((0,))["input_ids"]
    embeds = made.get_input_embeddings()(ids)
    with pytest.raises(ValueError, match=r"nobody knows which .*mm_token_type_ids: 1 for features of images"):
        made(inputs_embeds=embeds)
    with pytest.raises(ValueError, match=r"mm_token_type_ids has the shape \(1, 2\), but inputs_embeds"):
        made(inputs_embeds=embeds, mm_token_type_ids=torch.zeros(1, 2, dtype=torch.long))
    told = made(inputs_embeds=embeds, mm_token_type_ids=torch.zeros_like(ids)).logits
    assert gap(told, made(input_ids=ids).logits) <= LIMIT
    shared = sparse_model()
    shared(inputs_embeds=shared.get_input_embeddings()(ids))  # nothing has to be known


@pytest.mark.slow
@pytest.mark.parametrize("kind", POOLED)
def test_a_compiled_model_gives_the_same(kind):
    made, inputs = sparse_model(text_moe=KINDS[kind], vision_moe=None, connector_moe=None), batch((1, 2))
    real = inputs["attention_mask"].bool()
    with torch.no_grad():
        wanted = made(**inputs).logits[real]
        torch._dynamo.reset()
        compiled = torch.compile(made.model, backend="eager", fullgraph=True)
        hidden = compiled(**inputs).last_hidden_state
        assert gap(made.lm_head(hidden)[real], wanted) <= LIMIT


@torch.no_grad()
def test_a_classifier_routes_by_modality():
    config = sparse_config(text_moe=KINDS["isolated"], num_labels=3)
    made = tiny.redraw(VLMoEForSequenceClassification(config)).eval()
    check_open(made, chosen(made, lambda: made(**batch((1, 0)))))


@torch.no_grad()
def test_the_language_model_alone_is_refused():
    made = model("isolated")
    with pytest.raises(ValueError, match="Use the whole vision-language model"):
        made.model.language_model(input_ids=batch((0,))["input_ids"])


def test_routing_that_all_share_looks_for_no_image(monkeypatch):
    from modeling_vlmoe import routing

    def never(*args):
        raise AssertionError("looked for images")

    monkeypatch.setattr(routing, "require_image_tokens", never)
    inputs = batch((1, 1))
    sparse_model()(**inputs)
    sparse_model().train()(**inputs, labels=inputs["input_ids"])
    model("per_modality_balance")(**inputs)  # it is about the loss alone


def test_an_adapter_trains_both_routers(tmp_path):
    made = model("intra_inter")
    dense = copy.deepcopy(made)
    for config in (
        LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["router"]),
        lora_config(made, lora_r=2),
    ):
        wrapped = get_peft_model(copy.deepcopy(dense), config).train()
        inputs = batch((1, 1))
        wrapped(**inputs, labels=inputs["input_ids"]).loss.backward()
        trained = [name for name, one in wrapped.named_parameters() if one.requires_grad and "image_weight" in name]
        assert len(trained) == 3
        assert all(wrapped.get_parameter(name).grad.any() for name in trained)
    with torch.no_grad():
        for one in wrapped.parameters():
            if one.requires_grad:
                one += 0.1
    wrapped.eval().save_pretrained(tmp_path)
    from peft import PeftModel

    again = PeftModel.from_pretrained(dense, tmp_path).eval()
    with torch.no_grad():
        assert gap(again(**inputs).logits, wrapped(**inputs).logits) <= LIMIT
        merged = again.merge_and_unload()
        assert gap(merged(**inputs).logits, wrapped(**inputs).logits) <= 1e-4


# Towers that hand no keywords to their layers


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["bloom", pytest.param("mpt", marks=pytest.mark.slow)])
def test_layers_that_are_given_no_keywords_route_by_modality(family, kind):
    made = combined(family, VISION[0], vision_moe=None, connector_moe=None, text_moe=KINDS[kind])
    inputs = combined_inputs()
    if kind in POOLED:
        with torch.no_grad():
            check_open(made, chosen(made, lambda: made.generate(**inputs, **KEPT, suppress_tokens=[IMAGE_TOKEN])))
    made.train()(**inputs, labels=inputs["input_ids"]).loss.backward()
    routers = [one for name, one in made.named_parameters() if ".router." in name]
    assert all(one.grad.any() for one in routers)
    made.activation_checkpointing_enable()
    with pytest.raises(ValueError, match=r"would not know what it reads beside the token.*Switch"):
        made(**inputs, labels=inputs["input_ids"])


# VLMs of transformers, sparse in place


@torch.no_grad()
@pytest.mark.parametrize("kind", POOLED)
@pytest.mark.parametrize("family", ["qwen2_5_vl", "smolvlm", pytest.param("llava_next", marks=pytest.mark.slow)])
def test_a_vlm_in_place_routes_by_modality(family, kind):
    made, inputs = hosted(family, text_moe=KINDS[kind]), given(family)
    found = chosen(made, lambda: made(**inputs))
    assert len(found) == 3
    check_open(made, found)
    tokens = []
    check_open(made, chosen(made, lambda: tokens.append(made.generate(**inputs, **KEPT))))
    assert torch.equal(tokens[0], made.generate(**inputs, **KEPT, cache_implementation="static"))


@pytest.mark.parametrize("kind", KINDS)
def test_the_losses_of_a_vlm_in_place_are_the_plain_loops(kind):
    made, inputs = hosted("qwen2_5_vl", text_moe=KINDS[kind]).train(), given("qwen2_5_vl")
    outputs = made(**inputs, labels=inputs["input_ids"])
    outputs.loss.backward()
    weights = (made.config.text_moe.router_aux_loss_coef, made.config.text_moe.router_z_loss_coef)
    wanted = losses_of(made.eval().model, MicroBatch(inputs), weights)
    assert outputs.aux_loss.item() == pytest.approx(wanted.item(), rel=1e-4)


def test_raises_when_a_vlm_in_place_is_given_embeddings_that_nobody_tells_of():
    made, ids = hosted("qwen2_5_vl", text_moe=KINDS["isolated"]), torch.arange(6, 14)[None]
    embeds = made.get_input_embeddings()(ids)
    with pytest.raises(ValueError, match="nobody knows which of them are features of images"):
        made(inputs_embeds=embeds)
    marks = torch.zeros_like(ids)
    assert gap(made(inputs_embeds=embeds, mm_token_type_ids=marks).logits, made(input_ids=ids).logits) <= LIMIT


def test_a_video_is_an_image_to_the_router():
    """Qwen2.5-VL has a placeholder of its own for the features of videos."""
    made = hosted("qwen2_5_vl", text_moe=KINDS["isolated"])
    ids = torch.tensor([[5, made.config.video_token_id, made.config.image_token_id, 6]])
    context = made.model.router_context(None, input_ids=ids)
    assert context.is_image.tolist() == [[False, True, True, False]]


# A VLM whose LLM is given no features of images in the places of tokens, and why.
ELSEWHERE = {
    "florence2": "has an encoder, which reads its images",
    "kosmos-2": r"names no token that stands for images \(image_token_id, ",
    "mllama": "lets its LLM look at images by cross-attention",
}


@pytest.mark.parametrize("family", ELSEWHERE)
def test_raises_when_the_llm_is_given_no_images(family):
    values = tiny_vlm_config(family).to_dict() | {"body_model_type": family, "text_moe": KINDS["isolated"]}
    config = VLMoEConfig.from_dict(values)
    with pytest.raises(ValueError, match=rf"'isolated', but {family} {ELSEWHERE[family]}.*Choose \"shared\""):
        AutoModelForImageTextToText.from_config(config)


# Configuration


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"modality_experts": [1, 1, 2]}, "modality_routing is 'shared', which opens every expert"),
        ({"modality_routing": "isolated", "modality_experts": [1, 1, 2]}, "no expert is of both"),
        ({"modality_routing": "intra_inter", "modality_experts": [1, 1, 1]}, "add up to num_experts"),
        ({"modality_routing": "intra_inter", "modality_experts": [-1, 1, 4]}, "add up to num_experts"),
        ({"modality_routing": "isolated", "modality_experts": [1, 3, 0]}, "fewer experts than num_experts_per_tok"),
        ({"modality_routing": "intra_inter", "modality_experts": [3, 1, 0]}, "fewer experts than num_experts_per_tok"),
    ],
)
def test_raises_when_pools_are_impossible(fields, message):
    with pytest.raises(ValueError, match=message):
        sparse_config(text_moe=EXPERTS | fields).check_experts()


def test_raises_when_a_vit_is_to_route_by_modality():
    with pytest.raises(ValueError, match="a vision part sees images alone"):
        sparse_config(vision_moe=EXPERTS | {"modality_routing": "isolated"}).check_experts()


def test_pools_have_a_default():
    for kind, pools in (("intra_inter", [1, 1, 2]), ("isolated", [2, 2, 0])):
        config = sparse_config(text_moe=EXPERTS | {"modality_routing": kind})
        config.check_experts()
        assert config.text_moe.modality_experts == pools


def test_raises_when_stored_weights_are_to_be_routed_otherwise(tmp_path):
    model("isolated").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"modality_routing is 'shared', .* it is 'isolated'.*vlmoe convert-routing"):
        AutoModelForImageTextToText.from_pretrained(
            tmp_path, text_moe={"modality_routing": "shared", "modality_experts": None}
        )
