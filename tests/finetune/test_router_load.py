"""The experts' load against a direct count from the routers' logits."""

import pytest
import torch
from peft import get_peft_model

from modeling_vlmoe.finetune import RouterLoad, lora_config
from modeling_vlmoe.finetune.router_load import summarize
from modeling_vlmoe.finetune.settings import FinetuneSettings
from tests import models

IMAGES = (2, 0, 1)


@pytest.fixture
def tiny_model():
    return models.sparse_model()


def direct_count(logits_TE, keep_T, top_k=2):
    """Assignments per expert, token by token."""
    counts = [0] * logits_TE.shape[-1]
    for row, keep in zip(logits_TE.tolist(), keep_T.tolist(), strict=True):
        if keep:
            for expert in sorted(range(len(row)), key=lambda index: -row[index])[:top_k]:
                counts[expert] += 1
    return counts


@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_counts_are_those_of_the_logits(tiny_model, padding_side):
    batch = models.batch(IMAGES, padding_side=padding_side)
    with RouterLoad(tiny_model) as load, torch.no_grad():
        out = tiny_model(**batch, output_router_logits=True)
    real = batch["attention_mask"].reshape(-1).bool()
    is_image = (batch["input_ids"] == models.IMAGE_TOKEN).reshape(-1)
    for index, logits in enumerate(out.router_logits):
        text, image = load.counts[("text", index)].tolist()
        assert text == direct_count(logits, real & ~is_image)
        assert image == direct_count(logits, real & is_image)
    for layer, logits in zip(tiny_model.config.vision_moe.layers, out.vision_router_logits, strict=True):
        text, image = load.counts[("vision", layer)].tolist()
        assert sum(text) == 0
        assert image == direct_count(logits, torch.ones(len(logits)))
    (logits,) = out.connector_router_logits
    assert load.counts[("connector", None)].sum(0).tolist() == direct_count(logits, torch.ones(len(logits)))
    assert not load.losses


def test_image_tokens_are_told_in_embeddings(tiny_model):
    batch = models.batch(IMAGES)
    with RouterLoad(tiny_model) as told, torch.no_grad():
        tiny_model(**batch)
    embeds = tiny_model.get_input_embeddings()(batch.pop("input_ids"))
    with RouterLoad(tiny_model) as load, torch.no_grad():
        tiny_model(**batch, inputs_embeds=embeds)
    assert load.counts[("text", 0)][1].sum() > 0
    assert torch.equal(load.counts[("text", 0)], told.counts[("text", 0)])


def train_pass(model, batch):
    model.train()
    with RouterLoad(model, training_only=True) as load:
        out = model(**batch, labels=batch["input_ids"], output_router_logits=True)
        out.loss.backward()
    return load, out


def tune(model):
    settings = FinetuneSettings(lora_parts=["text", "vision"], lora_r=2, train_connector=True)
    return get_peft_model(model, lora_config(model, settings))


@pytest.mark.parametrize("use_reentrant", [False, True], ids=["non-reentrant", "reentrant"])
@pytest.mark.parametrize("prepare", [lambda model: model, tune], ids=["whole", "peft"])
def test_checkpointed_layers_count_once(prepare, use_reentrant):
    batch = models.batch(IMAGES)
    plain, _ = train_pass(prepare(models.sparse_model()), batch)
    model = prepare(models.sparse_model())
    model.activation_checkpointing_enable({"use_reentrant": use_reentrant})
    checkpointed, _ = train_pass(model, batch)
    assert plain.counts.keys() == checkpointed.counts.keys()
    assert len(plain.counts) == 3 + 2 + 1
    for layer, count in plain.counts.items():
        assert torch.equal(count, checkpointed.counts[layer]), layer
    for layer, losses in plain.mean_losses().items():
        torch.testing.assert_close(losses, checkpointed.mean_losses()[layer])


def test_losses_are_those_the_model_reports(tiny_model):
    load, out = train_pass(tiny_model, models.batch(IMAGES))
    for part, losses in out.router_losses.items():
        found = [value for layer, value in sorted(load.mean_losses().items(), key=str) if layer[0] == part]
        torch.testing.assert_close(torch.stack(found), losses)


def test_passes_in_eval_mode_are_left_out_where_asked(tiny_model):
    with RouterLoad(tiny_model, training_only=True) as load, torch.no_grad():
        tiny_model.eval()(**models.batch())
    assert not load.counts


def test_generation_with_a_cache_counts_its_steps(tiny_model):
    batch = models.batch((1, 1))
    with RouterLoad(tiny_model) as load:
        tiny_model.generate(**batch, max_new_tokens=3, min_new_tokens=3, do_sample=False)
    # The last new token is never read. Padding is left out of the prompt.
    assert load.counts[("text", 0)].sum() == 2 * (batch["attention_mask"].sum() + 2 * 2)


def test_no_hook_stays_behind(tiny_model):
    def hooks():
        return [[*module._forward_hooks, *module._forward_pre_hooks] for module in tiny_model.modules()]

    before = hooks()
    with RouterLoad(tiny_model):
        assert hooks() != before
    assert hooks() == before


def test_counting_goes_on_after_a_failed_pass(tiny_model):
    with RouterLoad(tiny_model) as load, torch.no_grad():
        with pytest.raises(ValueError, match="exactly one of"):
            tiny_model(attention_mask=torch.ones(1, 2))
        tiny_model(**models.batch((0,)))
    assert load.counts[("text", 0)].sum() == 2 * models.batch((0,))["attention_mask"].sum()


def test_summary_is_the_hand_computed_one():
    summary = summarize(torch.tensor([6, 2, 0, 0]))
    assert summary.max_load == pytest.approx(0.75)
    assert summary.dead_experts == 2
    assert summary.entropy == pytest.approx((0.75 * 0.2876820724 + 0.25 * 1.3862943611) / 1.3862943611)
    assert summarize(torch.tensor([5, 5])).entropy == pytest.approx(1.0)
    assert summarize(torch.tensor([3])).max_load == 1.0


@torch.no_grad()
def test_an_expert_that_is_closed_to_a_modality_is_not_dead_for_it():
    pools = {"num_experts": 6, "modality_routing": "isolated", "modality_experts": [2, 4, 0]}
    model, batch = models.sparse_model(text_moe=pools), models.batch(IMAGES)
    with RouterLoad(model) as load:
        model(**batch)
    counts = load.counts[layer := ("text", 0)]
    assert not counts[0, :2].any()  # text on images' experts
    assert not counts[1, 2:].any()
    image, text = (load.summary_of(modality)[layer] for modality in ("image", "text"))
    assert image.max_load == 0.5  # both experts of images, top-2
    assert (image.entropy, image.dead_experts) == (pytest.approx(1.0), 0)
    assert text.dead_experts == int((counts[0, 2:] == 0).sum())
    assert text.entropy == pytest.approx(summarize(counts[0, 2:]).entropy)
    assert load.summary()[layer].dead_experts == text.dead_experts
    with RouterLoad(model) as load:  # without images theirs get nothing, and are not dead
        model(**models.batch((0, 0)))
    assert load.summary()[layer] == load.summary_of("text")[layer]
    assert load.summary_of("image").keys().isdisjoint({layer})


@torch.no_grad()
def test_marks_tell_images_in_embeddings(tiny_model):
    embeds, marks = torch.randn(1, 9, 32), torch.tensor([[0, 0, 1, 1, 1, 2, 0, 0, 0]])
    with RouterLoad(tiny_model) as load:
        tiny_model(inputs_embeds=embeds, mm_token_type_ids=marks)
    assert load.counts[("text", 0)].sum(1).tolist() == [2 * 5, 2 * 4]
