"""The text gate: its formula, what it reads, that no answer reaches it, and that it is a router as others are."""

import copy
import json

import pytest
import torch

from modeling_vlmoe import VLMoEConfig, VLMoEForConditionalGeneration, VLMoEForSequenceClassification, visible_text
from modeling_vlmoe.blank_image import encode_nothing
from modeling_vlmoe.moe_config import MoEConfig
from modeling_vlmoe.part_images import PartImages, VisibleText, no_text
from modeling_vlmoe.router_losses import RouterContext
from modeling_vlmoe.routers import Router
from modeling_vlmoe.text_gate import TextGate
from modeling_vlmoe.visible_text import find_visible, unit_words
from tests import models, tiny, variable_images
from tests.modeling_vlmoe.text_gates import (
    GATE,
    PLAIN,
    answers,
    dialogue,
    dialogues,
    gated_model,
    leaks,
    replaced,
    routed,
)

NUM_EXPERTS, WIDTH, TEXT_WIDTH, SIZE = 3, 5, 6, 4
ROWS = ((1, 0, 2), (0, 1), (1,))  # of a batch: images of each turn


def drawn_router(seed=0, **fields):
    moe = MoEConfig(num_experts=NUM_EXPERTS, num_experts_per_tok=2, router_type="attention", router_text_size=SIZE)
    for name, value in fields.items():
        setattr(moe, name, value)
    return tiny.redraw(Router(WIDTH, moe, text_width=TEXT_WIDTH), seed, std=1.0)


def drawn_text(num_words=7, num_images=2, seed=1):
    """One sample; the first image sees the words at even places, the second the first three."""
    words = torch.randn(1, num_words, TEXT_WIDTH, generator=torch.Generator().manual_seed(seed))
    is_visible = torch.stack([torch.arange(num_words) % 2 == 0, torch.arange(num_words) < 3])[:num_images]
    return VisibleText(words, torch.zeros(num_images, dtype=torch.long), is_visible)


def context_of(images):
    return RouterContext(learns=False, images={"vision": images}).of("vision")


# ------------------------------------------------------------------------------------------------------------ formula


def documents_weights(queries, keys, values, readout, words):
    """S3 as the documents have it, in plain loops: w_k = exp(sum_i a_ki t_i) / sum_j exp(sum_i a_ji t_i), with scalar
    t_i = u . W_V t_i and a_ki the attention of expert k to word i.
    """
    scalars = [float(readout @ (values @ word)) for word in words]
    sums = []
    for query in queries:
        scores = [float(query @ (keys @ word)) / SIZE**0.5 for word in words]
        total = sum(torch.tensor(score, dtype=torch.float64).exp() for score in scores)
        shares = [torch.tensor(score, dtype=torch.float64).exp() / total for score in scores]
        sums.append(sum(share * scalar for share, scalar in zip(shares, scalars, strict=True)))
    exponentials = [value.exp() for value in sums]
    return torch.stack([value / sum(exponentials) for value in exponentials])


@torch.no_grad()
def test_one_u_scalar_values_and_no_linear_router_are_the_documents_formula():
    router, text = drawn_router(num_experts_per_tok=NUM_EXPERTS), drawn_text()
    router.weight.zero_()
    gate = router.text_gate
    gate.readout.copy_(gate.readout[:1].expand_as(gate.readout))
    x_TD = torch.randn(8, WIDTH)  # four tokens of each image
    _, weight_TK, expert_TK = router(x_TD, context_of(PartImages(2, None, text)))
    for image in range(2):
        seen = text.embeddings[0, text.is_visible[image]].double()
        tensors = [one.double() for one in (gate.queries, gate.keys, gate.values, gate.readout[0])]
        wanted = documents_weights(*tensors, seen)
        for token in range(4 * image, 4 * image + 4):
            got = torch.zeros(NUM_EXPERTS).scatter(0, expert_TK[token], weight_TK[token])
            torch.testing.assert_close(got.double(), wanted, rtol=0, atol=1e-6)


@torch.no_grad()
def test_logits_are_the_linear_router_and_the_gate():
    router, text = drawn_router(), drawn_text()
    x_TD, gate = torch.randn(6, WIDTH), router.text_gate
    logits_TE, _, _ = router(x_TD, context_of(PartImages(2, (4, 2), text)))
    for token, image in enumerate((0, 0, 0, 0, 1, 1)):
        words = text.embeddings[0, text.is_visible[image]].double()
        for expert in range(NUM_EXPERTS):
            scores = (words @ gate.keys.double().T) @ gate.queries[expert].double() / SIZE**0.5
            mixed = scores.softmax(0) @ (words @ gate.values.double().T)
            wanted = router.weight[expert].double() @ x_TD[token].double() + gate.readout[expert].double() @ mixed
            torch.testing.assert_close(logits_TE[token, expert].double(), wanted, rtol=0, atol=2e-6)


def test_an_image_without_text_adds_nothing_and_has_finite_gradients():
    router, text = drawn_router(), drawn_text()
    text.is_visible[1] = False
    plain = torch.nn.functional.linear(x_TD := torch.randn(6, WIDTH), router.weight)
    logits_TE, _, _ = router(x_TD, context_of(PartImages(2, None, text)))
    assert torch.equal(logits_TE[3:], plain[3:])
    assert not torch.allclose(logits_TE[:3], plain[:3])
    logits_TE.square().sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in router.parameters())
    nothing, _, _ = router(x_TD, context_of(PartImages(2, None, no_text(2, TEXT_WIDTH, torch.device("cpu")))))
    assert torch.equal(nothing, plain)


@torch.no_grad()
def test_autocast_changes_nothing():
    router, x_TD = drawn_router(), torch.randn(6, WIDTH)
    context = context_of(PartImages(2, None, drawn_text()))
    wanted = router(x_TD, context)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = router(x_TD, context)
    assert all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True))


def test_words_are_divided_by_their_root_mean_square():
    words = torch.randn(2, 3, TEXT_WIDTH)
    words[0, 0] = 0
    for scale in (1e-3, 1.0, 60.0):
        made = unit_words(words * scale)
        torch.testing.assert_close(made, unit_words(words))
        torch.testing.assert_close(made[1].square().mean(-1), torch.ones(3))
    assert made[0, 0].eq(0).all()


def test_a_gate_is_silent_at_first():
    config = models.sparse_config(text_moe=None, vision_moe=GATE, connector_moe=GATE)
    gates = [one for one in VLMoEForConditionalGeneration(config).modules() if isinstance(one, TextGate)]
    assert len(gates) == 3
    for gate in gates:
        assert gate.readout.eq(0).all()
        assert all(one.std() > 0.05 for one in (gate.queries, gate.keys, gate.values))


@torch.no_grad()
def test_with_u_zero_it_is_the_plain_router():
    gated = gated_model()
    plain = models.sparse_model(text_moe=None, vision_moe=PLAIN, connector_moe=PLAIN)
    plain.load_state_dict({name: one for name, one in gated.state_dict().items() if "text_gate" not in name})
    batch = dialogues(*ROWS)
    assert not torch.equal(gated(**batch).logits, plain(**batch).logits)
    for gate in (one for one in gated.modules() if isinstance(one, TextGate)):
        gate.readout.zero_()
    assert torch.equal(gated(**batch).logits, plain(**batch).logits)


# ------------------------------------------------------------------------------------------------------ what it reads


def test_tokens_are_of_the_images_in_their_order():
    device = torch.device("cpu")
    assert PartImages(3).of_token(6, device).tolist() == [0, 0, 1, 1, 2, 2]
    assert PartImages(3, (1, 3, 2)).of_token(6, device).tolist() == [0, 1, 1, 1, 2, 2]
    context = RouterContext(images={"vision": PartImages(2)})
    assert context.of("vision").image_of_token(4, device).tolist() == [0, 0, 1, 1]
    assert context.of("vision").is_read
    assert not context.of("connector").is_read
    assert context.of("text").image_of_token(4, device) is None


@pytest.mark.parametrize("images", [PartImages(3), PartImages(2, (3, 3)), PartImages(0)])
def test_raises_when_tokens_are_not_those_of_the_images(images):
    with pytest.raises(ValueError, match="7 tokens are routed, but there are"):
        images.of_token(7, torch.device("cpu"))


def test_an_image_sees_its_sample_up_to_the_answer_less_earlier_answers():
    ids, marks = dialogue((1, 0, 2))
    is_image = (ids == models.IMAGE_TOKEN)[None].repeat(2, 1)
    sample, is_visible = find_visible(marks[None].repeat(2, 1), is_image, 6, None)
    assert sample.tolist() == [0, 0, 0, 1, 1, 1]
    ends = (marks == 0).nonzero()[:, 0][::3].tolist()  # where each answer begins
    for image, end in zip(range(3), (ends[0], ends[2], ends[2]), strict=True):
        wanted = (marks == 3) & (torch.arange(len(ids)) < end)
        assert torch.equal(is_visible[image], wanted)
        assert torch.equal(is_visible[image + 3], wanted)


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_question_routes_the_images_that_see_it_and_no_others(side):
    model, batch = gated_model(), dialogues(*ROWS, side=side)
    before, (row, columns) = routed(model, batch), (0, (batch["mm_token_type_ids"][0] == 3).nonzero()[:, 0])
    for column, seen_by in ((columns[0], {0, 1, 2}), (columns[-1], {1, 2})):  # of the first turn, of the last
        where = torch.zeros_like(batch["input_ids"], dtype=torch.bool)
        where[row, column] = True
        for one, other in zip(before, routed(model, replaced(batch, where)), strict=True):
            assert set((one != other).flatten(1).any(1).nonzero()[:, 0].tolist()) == seen_by


@torch.no_grad()
@pytest.mark.parametrize("family", variable_images.SPARSE_TOWERS)
def test_images_of_any_size_are_routed_by_their_own_text(family):
    parts = {"text_moe": None, "vision_moe": GATE, "connector_moe": GATE}
    model, processor = variable_images.sparse_model(family, **parts), variable_images.processor(family)
    texts = ["one <image> is red", "two <image> and <image> are here"]
    pictures = variable_images.pictures(((24, 24), (8, 32), (21, 13)))
    inputs = dict(processor(images=[pictures[:1], pictures[1:]], text=texts, padding=True, return_tensors="pt"))
    ids = inputs["input_ids"]
    inputs["mm_token_type_ids"] = torch.where(ids == processor.image_token_id, 1, 3) * inputs["attention_mask"]
    before = model(**inputs, output_router_logits=True)
    where = torch.zeros_like(ids, dtype=torch.bool)
    where[0, (inputs["mm_token_type_ids"][0] == 3).nonzero()[0]] = True
    after = model(**replaced(inputs, where), output_router_logits=True)
    own = int((ids[0] == processor.image_token_id).sum())  # the first image's features
    one, other = before.connector_router_logits[0], after.connector_router_logits[0]
    assert (one[:own] != other[:own]).any(1).all()
    assert torch.equal(one[own:], other[own:])
    for one, other in zip(before.vision_router_logits, after.vision_router_logits, strict=True):
        changed = (one != other).any(1)
        assert changed.any()
        assert changed[: changed.sum()].all()  # those of the first image, which come first
    alone = dict(processor(images=[pictures[1:]], text=texts[1:], return_tensors="pt"))
    alone["mm_token_type_ids"] = torch.where(alone["input_ids"] == processor.image_token_id, 1, 3)
    length = alone["input_ids"].shape[1]
    real = inputs["attention_mask"][1].bool()
    torch.testing.assert_close(before.logits[1, real][:length], model(**alone).logits[0], rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("parts", [{"vision_moe": None}, {"connector_moe": None}, {"vision_moe": PLAIN}])
def test_either_part_may_have_it_alone(parts):
    model, batch = gated_model(**parts), dialogues((1,), (1,))
    where = torch.zeros_like(batch["input_ids"], dtype=torch.bool)
    where[0, (batch["mm_token_type_ids"][0] == 3).nonzero()[0]] = True
    before, after = model(**batch).image_hidden_states, model(**replaced(batch, where)).image_hidden_states
    assert not torch.equal(before[: tiny.NUM_PATCHES], after[: tiny.NUM_PATCHES])
    assert torch.equal(before[tiny.NUM_PATCHES :], after[tiny.NUM_PATCHES :])


@torch.no_grad()
def test_embeddings_in_the_place_of_ids_are_read_alike():
    model, batch = gated_model(), dialogues(*ROWS)
    embeds = model.get_input_embeddings()(batch["input_ids"])
    given = {name: value for name, value in batch.items() if name != "input_ids"} | {"inputs_embeds": embeds}
    assert torch.equal(model(**batch).logits, model(**given).logits)


# ---------------------------------------------------------------------------------------------------------- no answer


@pytest.mark.parametrize("side", ["left", "right"])
def test_no_answer_reaches_an_earlier_logit(side):
    assert not leaks(gated_model(), dialogues(*ROWS, side=side))


def test_no_answer_reaches_an_earlier_logit_in_training():
    model = gated_model().train()
    batch = dialogues(*ROWS)
    assert not leaks(model, batch)
    with torch.enable_grad():  # with router losses attached
        before = model(**batch, labels=batch["input_ids"]).logits
        after = model(**replaced(batch, answers(batch)), labels=batch["input_ids"]).logits
    for row, first in enumerate((answers(batch).long().argmax(1)).tolist()):
        assert torch.equal(before[row, :first], after[row, :first])


def reads_to_the_end(mark, is_image, num_images, counts):
    """A mutant: an image sees all text of its sample, answers too."""
    sample, is_visible = find_visible(mark, is_image, num_images, counts)
    return sample, (mark[sample] != 1) | is_visible


def reads_on(mark, is_image, num_images, counts):
    """A mutant: an image sees one token more than it may, the first of the answer."""
    sample, is_visible = find_visible(mark, is_image, num_images, counts)
    last = is_visible.shape[1] - 1 - is_visible.long().flip(1).argmax(1)
    is_visible[torch.arange(num_images), (last + 1).clamp(max=mark.shape[1] - 1)] = True
    return sample, is_visible


@pytest.mark.parametrize("mutant", [reads_to_the_end, reads_on])
def test_a_gate_that_reads_answers_is_caught(mutant, monkeypatch):
    monkeypatch.setattr(visible_text, "find_visible", mutant)
    assert leaks(gated_model(), dialogues(*ROWS))


@torch.no_grad()
def test_later_turns_do_not_reach_images_of_earlier_ones():
    model, batch = gated_model(), dialogues((1, 1))
    first_answer = int(answers(batch)[0].long().argmax())
    where = torch.arange(batch["input_ids"].shape[1])[None] >= first_answer
    other = replaced(batch, where & (batch["mm_token_type_ids"] != 1))
    for one, two in zip(routed(model, batch), routed(model, other), strict=True):
        assert torch.equal(one[0], two[0])
        assert not torch.equal(one[1], two[1])


@torch.no_grad()
def test_labels_change_no_logit():
    model, batch = gated_model(), dialogues(*ROWS)
    assert torch.equal(model(**batch).logits, model(**batch, labels=batch["input_ids"]).logits)


# ------------------------------------------------------------------------------------------------- a router as others


def test_checkpointing_gives_the_same_gradients():
    plain, batch = gated_model().train(), dialogues(*ROWS)
    again = copy.deepcopy(plain)
    again.activation_checkpointing_enable()
    for model in (plain, again):
        model(**batch, labels=batch["input_ids"]).loss.backward()
    gates = 0
    for (name, one), other in zip(plain.named_parameters(), again.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, msg=name)
        gates += "text_gate" in name and bool(one.grad.abs().sum() > 0)
    assert gates == 12


@pytest.mark.slow
@torch.no_grad()
def test_it_compiles_whole():
    model, batch = gated_model(), dialogues((1,), (2,))
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert torch.equal(compiled(**batch).logits, model(**batch).logits)


@torch.no_grad()
@pytest.mark.parametrize("kernel", ["batched_mm", "grouped_mm"])
def test_every_kernel_gives_the_same(kernel):
    model, batch = gated_model(), dialogues((1,), (2,))
    model.set_experts_implementation("eager")
    wanted = model(**batch).logits
    model.set_experts_implementation(kernel)
    assert models.gap(model(**batch).logits, wanted) < 1e-5


@torch.no_grad()
def test_it_is_saved_and_loaded_and_stays_in_float32(tmp_path):
    model, batch = gated_model(), dialogues((1,), (2,))
    model.save_pretrained(tmp_path)
    again, info = VLMoEForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert torch.equal(model(**batch).logits, again(**batch).logits)
    values = json.loads((tmp_path / "config.json").read_text())
    assert values["vision_moe"]["router_type"] == "attention"
    assert values["connector_moe"]["router_text_size"] == 8
    half = VLMoEForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.bfloat16)
    gates = {name: one for name, one in half.named_parameters() if "text_gate" in name}
    assert {one.dtype for one in gates.values()} == {torch.float32}
    assert half(**batch).logits.isfinite().all()
    half.to(torch.bfloat16)
    assert half(**batch).logits.isfinite().all()
    with pytest.raises(ValueError, match="router_text_size is 16, but in"):
        VLMoEForConditionalGeneration.from_pretrained(tmp_path, vision_moe={"router_text_size": 16})


@torch.no_grad()
def test_parents_upcycled_in_memory_compute_what_dense_ones_compute(tmp_path):
    folders = (
        tiny.save_vision_parent(tmp_path / "siglip", "siglip"),
        tiny.save_text_parent(tmp_path / "llama", "llama"),
    )
    torch.manual_seed(0)
    made = {"image_token_id": models.IMAGE_TOKEN}
    build = VLMoEForConditionalGeneration.from_vision_text_pretrained
    dense, sparse = build(*folders, **made), build(*folders, **made, vision_moe=GATE)
    for model in (dense, sparse):
        model.resize_token_embeddings(320)
    sparse.model.connector.load_state_dict(dense.model.connector.state_dict())
    batch = dialogues((1,), (2,))
    assert models.gap(sparse(**batch).logits, dense(**batch).logits) < 1e-5


def test_a_blank_image_has_no_text_and_reaches_every_parameter():
    model = gated_model().train()
    nothing = encode_nothing(model.model)
    assert nothing == 0
    nothing.backward()
    missing = [name for name, one in model.named_parameters() if "text_gate" in name and one.grad is None]
    assert not missing


def test_it_routes_in_a_classifier():
    parts = {"text_moe": None, "vision_moe": GATE, "connector_moe": GATE, "num_labels": 3}
    model = tiny.redraw(VLMoEForSequenceClassification(models.sparse_config(**parts)), std=0.3).eval()
    batch = dialogues((1,), (1,))
    outputs = model(**batch, labels=torch.tensor([0, 2]))
    outputs.loss.backward()
    assert all(one.grad is not None for name, one in model.named_parameters() if "text_gate" in name)
    where = torch.zeros_like(batch["input_ids"], dtype=torch.bool)
    where[0, (batch["mm_token_type_ids"][0] == 3).nonzero()[0]] = True
    for one, other in zip(routed(model, batch), routed(model, replaced(batch, where)), strict=True):
        assert not torch.equal(one, other)


# ----------------------------------------------------------------------------------------------------------- refusals


def test_raises_when_the_llm_is_to_have_it():
    with pytest.raises(ValueError, match=r"text_moe\.router_type is"):
        models.sparse_config(text_moe=GATE)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"router_text_size": 8}, "vision_moe.router_text_size is 8, but router_type is 'softmax'"),
        ({"router_type": "attention", "router_text_size": 0}, "vision_moe.router_text_size is 0; expected 1 or more"),
        ({"router_type": "attentive"}, "vision_moe"),
    ],
)
def test_raises_when_its_fields_do_not_fit(fields, said):
    with pytest.raises(ValueError, match=said):
        models.sparse_config(vision_moe=PLAIN | fields)


def test_its_width_is_filled_in():
    config = models.sparse_config(vision_moe=PLAIN | {"router_type": "attention"})
    assert config.vision_moe.router_text_size == 64
    assert VLMoEConfig.from_dict(config.to_dict()).vision_moe == config.vision_moe


def test_raises_when_the_texts_width_is_not_known():
    with pytest.raises(ValueError, match="their width is not known"):
        Router(WIDTH, MoEConfig(**GATE))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda marks: None, "mm_token_type_ids is not given"),
        (lambda marks: (marks == 1).long(), "mm_token_type_ids marks none"),
        (lambda marks: marks[:, 1:], "mm_token_type_ids has the shape"),
    ],
    ids=["none", "images_only", "shape"],
)
def test_raises_when_images_come_without_marks(change, said):
    model, batch = gated_model(), dialogues(*ROWS)
    given = batch | {"mm_token_type_ids": change(batch["mm_token_type_ids"])}
    for run in (model, model.model, model.generate):
        with pytest.raises(ValueError, match=said):
            run(**given)


@torch.no_grad()
def test_prompts_without_any_text_are_taken():
    model, image = gated_model(), torch.full((1, tiny.NUM_PATCHES), models.IMAGE_TOKEN)
    marks = torch.ones_like(image)
    assert model(input_ids=image, mm_token_type_ids=marks, pixel_values=models.pixels(1)).logits.isfinite().all()
    text = torch.randint(6, 290, (1, 5))
    assert model(input_ids=text).logits.isfinite().all()  # no image, no marks


def test_raises_when_images_are_encoded_alone():
    with pytest.raises(ValueError, match="images encoded alone"):
        gated_model().get_image_features(models.pixels(1))
