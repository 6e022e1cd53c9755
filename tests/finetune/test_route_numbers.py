"""The numbers of `vlmoe route` against plain loops over the routers' logits, token by token."""

import math
from collections import Counter, defaultdict

import pytest
import torch
from sklearn.metrics import normalized_mutual_info_score

from modeling_vlmoe.delta_experts import DeltaExperts
from modeling_vlmoe.finetune import ChatCollator, load_chat_data, lora_config
from modeling_vlmoe.finetune.expert_similarity import experts_similarity, find_blocks
from modeling_vlmoe.finetune.route.measures import (
    Tally,
    by_chance,
    load_entropy,
    shared_information,
    table_by_chance,
)
from modeling_vlmoe.finetune.route.report import build_report
from modeling_vlmoe.finetune.route.run import RoutingRun, answer_of, label_of, spaced
from modeling_vlmoe.finetune.route.settings import RouteSettings
from modeling_vlmoe.finetune.router_load import IMAGE, TEXT, RouterLoad, read_routing
from modeling_vlmoe.finetune.settings import FinetuneSettings
from tests import models

TOP_K = 2


def routing_of(model, processor, row):
    """One row alone: for each layer and modality its tokens, (chosen experts, top probability) each."""
    batch = ChatCollator(processor)([dict(row)])
    batch.pop("labels")
    with torch.no_grad():
        out = model(**batch, output_router_logits=True)
    is_image = (batch["input_ids"][0] == processor.image_token_id).tolist()
    layers = {("text", index): (logits, is_image) for index, logits in enumerate(out.router_logits)}
    if row["images"]:
        for layer, logits in zip(model.config.vision_moe.layers, out.vision_router_logits, strict=True):
            layers["vision", layer] = (logits, [True] * len(logits))
        layers["connector", None] = (out.connector_router_logits[0], [True] * len(out.connector_router_logits[0]))
    found = defaultdict(list)
    for layer, (logits, kinds) in layers.items():
        for scores, of_image in zip(logits.tolist(), kinds, strict=True):
            chosen = sorted(range(len(scores)), key=lambda expert: -scores[expert])[:TOP_K]
            total = sum(math.exp(score) for score in scores)
            found[layer, "image" if of_image else "text"].append((chosen, math.exp(max(scores)) / total))
    return found


@pytest.fixture(scope="module")
def rows(pictures):
    return load_chat_data(pictures, "train")


@pytest.fixture
def run(model, processor, rows):
    made = RoutingRun(model, processor, batch_size=3)
    made.add("a", rows, len(rows), 2, answer_of)
    made.add("b", rows.select(range(2)), 5, 0, answer_of)
    return made


def test_counts_are_those_of_a_plain_loop(run, model, processor, rows):
    wanted = defaultdict(list)
    for index, row in enumerate(rows):
        for key, tokens in routing_of(model, processor, row).items():
            wanted[key] += [(index, *token) for token in tokens]
    seen = {(layer, modality): tally for (layer, name, modality), tally in run.tallies.items() if name == "a"}
    assert set(seen) == set(wanted)
    for key, tally in seen.items():
        tokens = wanted[key]
        counts, pairs, samples = [0] * 4, [[0] * 4 for _ in range(4)], defaultdict(lambda: [0] * 4)
        for index, chosen, _ in tokens:
            for expert in chosen:
                counts[expert] += 1
                samples[index][expert] += 1
                for other in chosen:
                    pairs[expert][other] += 1
        assert tally.tokens == len(tokens)
        assert tally.assigned_E.tolist() == counts
        assert tally.together_EE.tolist() == pairs
        assert {index: count_E.tolist() for index, count_E in tally.by_sample.items()} == dict(samples)
        assert tally.mean_confidence == pytest.approx(sum(top for *_, top in tokens) / len(tokens), abs=1e-5)
        assert tally.dead == [expert for expert in range(4) if not counts[expert]]
        shares = [count / sum(counts) for count in counts if count]
        assert load_entropy(tally) == pytest.approx(-sum(share * math.log(share) for share in shares) / math.log(4))


def test_datasets_are_told_apart(run):
    of_a, of_b = (run.tallies[("text", 0), name, "text"] for name in "ab")
    assert 0 < of_b.tokens < of_a.tokens
    assert len(run.labels["b"]) == 2


def test_every_text_token_has_one_class_of_words(run):
    tally = run.tallies[("text", 1), "a", "text"]
    assert sum(tally.by_class.values()).tolist() == tally.assigned_E.tolist()
    assert {"special", "template", "other"} <= set(tally.by_class)
    assert not run.tallies[("text", 1), "a", "image"].by_class


def test_what_is_shown_is_what_was_chosen(run, model, processor, rows):
    first = run.samples[0]
    single = routing_of(model, processor, rows[0])
    words = iter(single[("text", 2), "text"])
    for token, expert in zip(first.tokens, first.experts["text", 2], strict=True):
        assert expert == (-1 if token is None else next(words)[0][0])
    assert sum(token is None for token in first.tokens) == 1
    for layer in [("vision", 1), ("connector", None), ("text", 0)]:
        ((num_rows, num_columns, experts),) = first.patches[layer]
        assert (num_rows, num_columns) == (3, 3)
        assert experts == [chosen[0] for chosen, _ in single[layer, "image"]]
    assert first.pictures[0].image.getpixel((12, 12)) == pytest.approx((220, 20, 20), abs=2)


@pytest.mark.parametrize("seed", range(3))
def test_information_is_sklearns(seed):
    draw = torch.Generator().manual_seed(seed)
    labels, experts = torch.randint(5, (400,), generator=draw), torch.randint(8, (400,), generator=draw)
    experts = torch.where(labels < 2, labels, experts)
    count_LE = torch.zeros(5, 8, dtype=torch.long)
    for label, expert in zip(labels, experts, strict=True):
        count_LE[label, expert] += 1
    wanted = normalized_mutual_info_score(labels, experts, average_method="geometric")
    assert shared_information(count_LE) == pytest.approx(wanted)
    assert table_by_chance(count_LE) < 0.1 < wanted


def test_information_is_nothing_where_nothing_varies_and_everything_where_it_decides():
    assert shared_information(torch.tensor([[3, 5]])) == 0
    assert shared_information(torch.tensor([[0, 7], [4, 0]])) == pytest.approx(1)


def test_labels_shuffled_over_few_samples_show_that_little_is_known():
    """Tokens of one sample go together: what chance gives is far above what it would for tokens."""
    count_SE = torch.tensor([[40, 0], [0, 40], [40, 0], [0, 40]])
    label_S = torch.tensor([0, 1, 0, 1])
    assert by_chance(count_SE, label_S, 2) > 0.15
    assert table_by_chance(torch.tensor([[80, 0], [0, 80]])) < 0.02


def route_of(model, processor, rows):
    run = RoutingRun(model, processor)
    run.add("a", rows, 8, 1, answer_of)
    source = [{"label": "a", "name": "a", "rows": len(rows)}]
    return build_report(run, {"name": "m"}, source, RouteSettings("m", ["a"]))


def layer_of(report, name):
    return next(layer for layer in report["layers"] if layer["name"] == name)


def test_closed_experts_are_neither_dead_nor_in_the_entropy(processor, rows):
    moe = models.EXPERTS | {"num_experts": 6, "modality_routing": "isolated"}
    model = models.sparse_model(image_token_id=processor.image_token_id, text_moe=moe)
    loads = {one["modality"]: one for one in layer_of(route_of(model, processor, rows), "text/layer_0")["loads"]}
    assert loads["image"]["open_experts"] == loads["text"]["open_experts"] == 3
    assert loads["image"]["assignments"][3:] == loads["text"]["assignments"][:3] == [0, 0, 0]
    assert set(loads["text"]["dead_experts"]) <= {3, 4, 5}
    shares = [share for share in loads["text"]["load"] if share]
    wanted = -sum(share * math.log(share) for share in shares) / math.log(3)
    assert loads["text"]["entropy"] == pytest.approx(wanted, abs=1e-5)


def test_layers_of_a_vit_may_differ_in_their_experts(processor, rows):
    moe = models.EXPERTS | {"num_experts": [3, 6], "layers": [1, 2]}
    model = models.sparse_model(image_token_id=processor.image_token_id, vision_moe=moe)
    report = route_of(model, processor, rows)
    assert [layer_of(report, f"vision/layer_{index}")["num_experts"] for index in (1, 2)] == [3, 6]


def test_a_router_of_rows_sends_tokens_to_several_experts_or_none():
    """Where experts choose tokens, a router gives rows of a token and an expert each."""
    moe = models.sparse_config().vision_moe
    logits = torch.tensor([[2.0, 0.0], [0.0, 1.0], [0.0, 0.0]])
    output = (logits, torch.tensor([[0.4], [0.6], [1.0]]), torch.tensor([[0], [1], [1]]), torch.tensor([0, 0, 1]))
    routed = read_routing(output, moe, torch.full((3,), IMAGE), torch.ones(3, dtype=torch.bool))
    assert routed.chosen_TE.tolist() == [[True, True], [False, True], [False, False]]
    assert routed.first_T.tolist() == [1, 1, -1]
    tally = Tally(2)
    tally.add(routed, torch.ones(3, dtype=torch.bool), torch.zeros(3, dtype=torch.long))
    assert (tally.tokens, tally.unserved, tally.assigned_E.tolist()) == (3, 1, [1, 2])


def test_one_open_expert_is_no_confidence():
    moe = models.sparse_config().text_moe
    lowest = torch.finfo(torch.float32).min
    output = (torch.tensor([[2.0, lowest], [1.0, 1.0]]), torch.ones(2, 1), torch.tensor([[0], [1]]))
    load = RouterLoad(models.sparse_model())
    load.take(("text", 0), read_routing(output, moe, torch.tensor([TEXT, TEXT]), torch.ones(2, dtype=torch.bool)))
    assert load.mean_confidence() == {("text", 0): {TEXT: (0.5, 1)}}


def loop_similarity(weights):
    """The mean cosine and the mean distance over norm, pair by pair."""
    pairs = [(one, other) for place, one in enumerate(weights) for other in weights[place + 1 :]]
    cosines = [torch.dot(one, other) / one.norm() / other.norm() for one, other in pairs]
    apart = [(one - other).norm() for one, other in pairs]
    norm = sum(one.norm() for one in weights) / len(weights)
    return (sum(cosines) / len(pairs)).item(), (sum(apart) / len(pairs) / norm).item()


@pytest.mark.parametrize("kind", ["full", "delta", "lora"])
def test_similarity_is_that_of_the_weights_that_are_computed_with(kind):
    moe = models.EXPERTS | ({"expert_type": "delta", "expert_rank": 2} if kind == "delta" else {})
    model = models.sparse_model(text_moe=moe)
    if kind == "lora":
        from peft import get_peft_model

        model = get_peft_model(model, lora_config(model, FinetuneSettings(lora_r=2)))
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                torch.nn.init.normal_(parameter)
    block = find_blocks(model.get_base_model().model if kind == "lora" else model.model)["text", 1]
    found = experts_similarity(block.experts)
    if kind == "lora":
        merged = model.merge_and_unload()
        block = find_blocks(merged.model)["text", 1]
    experts = block.experts
    if isinstance(experts, DeltaExperts):
        deltas = experts.deltas(None)
        stacks = [getattr(experts, name) + deltas[f"{name}_b"] @ deltas[f"{name}_a"] for name in experts.weight_shapes]
    else:
        stacks = [getattr(experts, name) for name in experts.weight_shapes]
    vectors = [torch.cat([stack[expert].flatten() for stack in stacks]).double().detach() for expert in range(4)]
    cosine, distance = loop_similarity(vectors)
    assert found.cosine == pytest.approx(cosine, abs=1e-5)
    assert found.distance == pytest.approx(distance, rel=1e-4)


def test_copies_are_no_distance_apart():
    model = models.sparse_model()
    experts = find_blocks(model.model)["connector", None].experts
    with torch.no_grad():
        for parameter in experts.parameters():
            parameter.copy_(parameter[:1].clone().expand_as(parameter))
    found = experts_similarity(experts)
    assert found.distance == 0
    assert found.cosine == pytest.approx(1)


def test_rows_are_spaced_evenly_from_the_first():
    assert spaced(10, 4) == [0, 2, 5, 7]
    assert spaced(3, 9) == [0, 1, 2]


def test_labels_are_answers_or_a_field(rows):
    assert label_of(rows[0], None) == "red"
    assert Counter(label_of(row, "kind") for row in rows)["colour"] == 4


def test_raises_when_a_row_has_no_such_field(rows):
    with pytest.raises(ValueError, match="'colur', which label_field names; expected one of kind"):
        label_of(rows[0], "colur")


@pytest.mark.parametrize("wrong", [{"num_samples": 0}, {"batch_size": 0}, {"num_shown": -1}, {"data": []}])
def test_raises_when_a_setting_cannot_be(wrong):
    with pytest.raises(ValueError, match=r"expected|name one source"):
        RouteSettings(**({"checkpoint": "m", "data": ["d"]} | wrong))
