"""`generate` with a text gate: images are encoded before forward, and still see their text and nothing else."""

import pytest
import torch

from tests.modeling_vlmoe.text_gates import answers, dialogues, gated_model, replaced

ROWS = ((1, 2), (1,), (0, 1), (0,))  # images of each turn; the last turn of each row is to be answered
KEPT = {"max_new_tokens": 5, "min_new_tokens": 5, "pad_token_id": 0, "do_sample": False}
MODES = {
    "greedy": {},
    "static_cache": {"cache_implementation": "static"},
    "no_cache": {"use_cache": False},
    "beams": {"num_beams": 3},
    "several_returns": {"num_beams": 4, "num_return_sequences": 2},
}


@pytest.fixture(scope="module")
def model():
    return gated_model()


def prompts(*rows):
    """Dialogues whose last answer is cut off, padded on the left."""
    batch = dialogues(*rows)
    last = answers(batch).long().flip(1).cumprod(1).flip(1).bool()  # all end with an answer of three tokens
    assert last[:, -3:].all()
    return {name: value if name == "pixel_values" else value[:, :-3] for name, value in batch.items()}


def one_of(batch, rows, row):
    """One row alone, without its padding."""
    real = batch["attention_mask"][row].bool()
    alone = {name: value[row, real][None] for name, value in batch.items() if name != "pixel_values"}
    if count := sum(rows[row]):
        first = sum(map(sum, rows[:row]))
        alone["pixel_values"] = batch["pixel_values"][first : first + count]
    return alone


def new_tokens(model, inputs, **kwargs):
    length = inputs["input_ids"].shape[1] if "input_ids" in inputs else 0
    return model.generate(**inputs, **(KEPT | kwargs))[:, length:]


@pytest.mark.parametrize("mode", MODES)
def test_a_batch_generates_what_its_singles_generate(model, mode):
    batch = prompts(*ROWS)
    together = new_tokens(model, batch, **MODES[mode])
    alone = [new_tokens(model, one_of(batch, ROWS, row), **MODES[mode]) for row in range(len(ROWS))]
    assert torch.equal(together, torch.cat(alone))


def test_generating_agrees_with_whole_forward_passes(model):
    batch = prompts((1, 2))
    given = dict(batch)
    for _ in range(5):
        with torch.no_grad():
            token = model(**given).logits[:, -1:].argmax(-1)
        given["input_ids"] = torch.cat([given["input_ids"], token], 1)
        for name, value in (("attention_mask", 1), ("mm_token_type_ids", 0)):
            given[name] = torch.cat([given[name], torch.full_like(token, value)], 1)
    assert torch.equal(given["input_ids"][:, -5:], new_tokens(model, batch))


def test_embeddings_in_the_place_of_ids_generate_alike(model):
    batch = prompts((1, 2), (1,))
    embeds = model.get_input_embeddings()(batch["input_ids"])
    given = {name: value for name, value in batch.items() if name != "input_ids"} | {"inputs_embeds": embeds}
    assert torch.equal(new_tokens(model, batch), new_tokens(model, given))


@torch.no_grad()
def test_prefill_and_decode_give_the_logits_of_a_whole_pass(model):
    """And so an answer that is decoded changes no logit before it."""
    batch = dialogues((1, 2))
    whole, length = model(**batch).logits, batch["input_ids"].shape[1]
    per_token = ("input_ids", "mm_token_type_ids")
    step = {name: batch[name][:, : length - 3] for name in per_token} | {"pixel_values": batch["pixel_values"]}
    outputs, logits = model(**step, use_cache=True), []
    logits.append(outputs.logits)
    for place in range(length - 3, length):
        cache = outputs.past_key_values
        outputs = model(input_ids=batch["input_ids"][:, place : place + 1], past_key_values=cache, use_cache=True)
        logits.append(outputs.logits)
    torch.testing.assert_close(torch.cat(logits, 1), whole, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mode", ["greedy", "beams"])
def test_earlier_answers_do_not_route_but_questions_do(model, mode):
    """Of the images that `generate` encodes: what the LLM itself makes of an earlier answer is another matter."""
    batch, seen = prompts((1, 2), (1,)), []

    def note(module, args, output):
        seen.append(output[0])

    handle = model.model.connector.mlp.router.register_forward_hook(note)
    try:
        new_tokens(model, batch, **MODES[mode])
        new_tokens(model, replaced(batch, answers(batch)), **MODES[mode])
        new_tokens(model, replaced(batch, batch["mm_token_type_ids"] == 3), **MODES[mode])
    finally:
        handle.remove()
    assert len(seen) == 3  # images are encoded once each time
    assert torch.equal(seen[0], seen[1])
    assert not torch.equal(seen[0], seen[2])
