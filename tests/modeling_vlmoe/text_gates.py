"""Tiny models whose image parts route by the text, and batches with marked text."""

from typing import Any

import torch
from torch import Tensor

from tests import models, tiny

GATE = {"num_experts": 4, "num_experts_per_tok": 2, "router_type": "attention", "router_text_size": 8}
PLAIN = {"num_experts": 4, "num_experts_per_tok": 2}
ANSWER = 3  # how many tokens the assistant says in `dialogue`


def gated_model(**fields: Any) -> Any:
    """ViT and connector with a text gate that matters, the LLM dense."""
    parts = {"text_moe": None, "vision_moe": GATE, "connector_moe": GATE} | fields
    return tiny.redraw(models.VLMoEForConditionalGeneration(models.sparse_config(**parts)), std=0.3).eval()


def dialogue(turns: tuple[int, ...], seed: int = 0, num_text: int = 4) -> tuple[Tensor, Tensor]:
    """Turns with so many images each, every one answered: the ids, (sequence,), and their marks."""
    generator = torch.Generator().manual_seed(seed)
    ids, marks = [], []
    for num_images in turns:
        words = torch.randint(6, 290, (num_text + ANSWER,), generator=generator)
        image = torch.full((tiny.NUM_PATCHES,), models.IMAGE_TOKEN)
        ids += [words[:2], *[image] * num_images, words[2:]]
        marks += [torch.full((2,), 3), *[torch.ones_like(image)] * num_images, torch.full((num_text - 2,), 3)]
        marks.append(torch.zeros(ANSWER, dtype=torch.long))
    return torch.cat(ids), torch.cat(marks)


def dialogues(*rows: tuple[int, ...], side: str = "left", num_text: int = 4) -> dict[str, Tensor]:
    """A padded batch of dialogues; images in reading order."""
    made = [dialogue(turns, seed, num_text + seed) for seed, turns in enumerate(rows)]
    length = max(len(ids) for ids, _ in made)
    batch = {
        name: torch.zeros(len(rows), length, dtype=torch.long)
        for name in ("input_ids", "attention_mask", "mm_token_type_ids")
    }
    for row, (ids, marks) in enumerate(made):
        place = slice(length - len(ids), None) if side == "left" else slice(len(ids))
        batch["input_ids"][row, place], batch["attention_mask"][row, place] = ids, 1
        batch["mm_token_type_ids"][row, place] = marks
    if total := sum(map(sum, rows)):
        batch["pixel_values"] = models.pixels(total)
    return batch


def answers(batch: dict[str, Tensor]) -> Tensor:
    """Where the assistant speaks, (batch, sequence)."""
    return (batch["mm_token_type_ids"] == 0) & batch["attention_mask"].bool()


def replaced(batch: dict[str, Tensor], where: Tensor) -> dict[str, Tensor]:
    """The batch with other words where a mask says so."""
    ids = batch["input_ids"]
    return batch | {"input_ids": torch.where(where, (ids - 6 + 97) % 284 + 6, ids)}


@torch.no_grad()
def leaks(model: Any, batch: dict[str, Tensor]) -> list[tuple[int, int]]:
    """The places of the answers' tokens of which a change changes an earlier logit of their sample."""
    before, found = model(**batch).logits, []
    for row, column in answers(batch).nonzero().tolist():
        where = torch.zeros_like(batch["input_ids"], dtype=torch.bool)
        where[row, column] = True
        after = model(**replaced(batch, where)).logits
        if not torch.equal(before[row, :column], after[row, :column]):
            found.append((row, column))
    return found


def routed(model: Any, batch: dict[str, Tensor]) -> list[Tensor]:
    """The router logits of ViT and connector, (images, tokens of one, experts) per layer."""
    outputs = model(**batch, output_router_logits=True)
    layers = [*(outputs.vision_router_logits or ()), *(outputs.connector_router_logits or ())]
    return [logits.reshape(len(batch["pixel_values"]), -1, logits.shape[-1]) for logits in layers]
