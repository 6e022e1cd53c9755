"""Runs a model over samples, teacher-forced, and adds up what its routers do."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers.utils import logging as host_logging

from modeling_vlmoe.image_tokens import find_image_tokens
from modeling_vlmoe.modeling_in_place import is_in_place

from ..callbacks import MODALITIES
from ..collator import ChatCollator
from ..data import ROW
from ..router_load import TEXT, Layer, Routed
from ..rows import where_is
from .measures import Tally
from .places import ImagePlaces, Picture
from .trace import RoutingTrace
from .words import Token, read_tokens

Row = Mapping[str, Any]
Key = tuple[Layer, str, str]  # layer, dataset, modality
MAX_TOKENS = 400  # of a shown sample's text


@dataclass
class Sample:
    """A row that is shown.

    Attributes:
        dataset: where it is from.
        row: its number there, from 1.
        label: its label.
        tokens: its text, None where an image's tokens stand.
        pictures: its images as the ViT sees them.
        experts: for each layer of the LLM the expert of each of `tokens`, -1 for none.
        patches: for each layer and picture its rows, its columns and the expert of each patch; None where it is not
            known which token is which patch.
    """

    dataset: str
    row: int
    label: str
    tokens: list[Token | None] = field(default_factory=list)
    pictures: list[Picture] = field(default_factory=list)
    experts: dict[Layer, list[int]] = field(default_factory=dict)
    patches: dict[Layer, list[tuple[int, int, list[int]] | None]] = field(default_factory=dict)


def answer_of(row: Row) -> str:
    """What the assistant says last.

    Raises:
        ValueError: if it says nothing.
    """
    said = [message for message in row["messages"] if message["role"] == "assistant"]
    if not said:
        raise ValueError(f"{where_is(row)} has no message of the assistant; give one, or leave the row out.")
    content = said[-1]["content"]
    return content if isinstance(content, str) else "".join(part["text"] or "" for part in content)


def label_of(row: Row, label_field: str | None) -> str:
    """A row's label: its answer, or one of its fields.

    Raises:
        ValueError: if it has no such field.
    """
    if label_field is None:
        return answer_of(row).strip()
    if row.get(label_field) is None:
        known = sorted(name for name in row if name not in ("messages", "images", ROW))
        raise ValueError(
            f"{where_is(row)} has no {label_field!r}, which label_field names; expected one of {', '.join(known)}, or "
            "leave label_field out to label by the answer."
        )
    return str(row[label_field])


def text_of(row: Row) -> list[str]:
    """The texts of a row's messages, in order."""
    found: list[str] = []
    for message in row["messages"]:
        content = message["content"]
        if isinstance(content, str):
            found.append(content)
        else:
            found += [part["text"] for part in content if part["type"] == "text" and part["text"]]
    return found


def spaced(number: int, wanted: int) -> list[int]:
    """So many indices below a number, evenly spaced, the first among them."""
    wanted = min(number, wanted)
    return [index * number // wanted for index in range(wanted)]


@dataclass
class PassedBatch:
    """One pass.

    Attributes:
        rows: its rows.
        samples: what is kept of each, None for those that are not shown.
        batch: the collator's.
        is_image: which tokens are of images, (batch, sequence).
        places: where the images' patches are.
        routed: what each layer did.
    """

    rows: list[Row]
    samples: list[Sample | None]
    batch: Mapping[str, Any]
    is_image: Tensor
    places: ImagePlaces
    routed: dict[Layer, Routed]


class RoutingRun:
    """A model's routing over datasets.

    Args:
        model: a vlmoe model, without an adapter around it.
        processor: its processor.
        batch_size: rows of a pass.

    Attributes:
        tallies: by layer, dataset and modality.
        labels: for each dataset, the labels of its samples.
        samples: those that are shown.
    """

    def __init__(self, model: Any, processor: Any, batch_size: int = 8):
        self.model, self.processor = model.eval(), processor
        self.trace = RoutingTrace(model)
        self.body = self.trace.body
        # Hosts cut images into tiles in ways of their own: alone, a row's tiles are known to be its.
        self.batch_size = 1 if is_in_place(model.config) else batch_size
        self.tallies: dict[Key, Tally] = {}
        self.labels: dict[str, list[str]] = {}
        self.samples: list[Sample] = []

    def add(self, name: str, dataset: Dataset | Sequence[Row], num_samples: int, num_shown: int, label: Any) -> None:
        """Runs over a dataset.

        Args:
            name: what it is called.
            dataset: its rows.
            num_samples: how many rows are measured.
            num_shown: how many of these are shown.
            label: gives a row's label.
        """
        rows = [dataset[index] for index in spaced(len(dataset), num_samples)]
        self.labels[name] = [label(row) for row in rows]
        shown = set(spaced(len(rows), num_shown)) if num_shown else set()
        bar = host_logging.tqdm(total=len(rows), desc=f"Routing {name}", leave=False, disable=None)
        for first in range(0, len(rows), self.batch_size):
            numbers = range(first, min(first + self.batch_size, len(rows)))
            samples = [
                Sample(name, rows[index].get(ROW) or index + 1, self.labels[name][index]) if index in shown else None
                for index in numbers
            ]
            for passed, start in self._passes([rows[index] for index in numbers], samples):
                self._count(name, passed, first + start)
                self._keep(passed)
            bar.update(len(numbers))
        bar.close()
        self.samples.sort(key=lambda sample: list(self.labels).index(sample.dataset))

    def _passes(self, rows: list[Row], samples: list[Sample | None]) -> Iterator[tuple[PassedBatch, int]]:
        """The pass of some rows; one by one where it is not known which image's tokens are whose."""
        passed = self._run(rows, samples)
        if len(rows) == 1 or self._knows_owners(passed):
            yield passed, 0
            return
        for index, (row, sample) in enumerate(zip(rows, samples, strict=True)):
            yield self._run([row], [sample]), index

    def _knows_owners(self, passed: PassedBatch) -> bool:
        seen = [layer for layer in passed.routed if layer[0] != "text"]
        owners = (passed.places.owners(layer, len(passed.routed[layer].mask_T), len(passed.rows)) for layer in seen)
        return all(found is not None for found in owners)

    @torch.no_grad()
    def _run(self, rows: list[Row], samples: list[Sample | None]) -> PassedBatch:
        batch = ChatCollator(self.processor)([dict(row) for row in rows])
        batch.pop("labels")
        inputs = {
            name: value.to(self.model.device) if isinstance(value, Tensor) else value for name, value in batch.items()
        }
        self.trace.reset()
        with self.trace:
            self.model(**inputs)
        routed = dict(self.trace.routed)
        is_image = find_image_tokens(self.body, batch["input_ids"], None)
        assert is_image is not None
        places = ImagePlaces(self.body, self.processor, rows, batch)
        return PassedBatch(rows, samples, batch, is_image, places, routed)

    def _count(self, name: str, passed: PassedBatch, first: int) -> None:
        """Adds a pass to the tallies; its rows are the dataset's samples from `first` on."""
        classes = self._classes(passed)
        for layer, routed in passed.routed.items():
            num_tokens, num_experts = routed.chosen_TE.shape
            if layer[0] == "text":
                row_T = torch.arange(num_tokens) // (num_tokens // len(passed.rows))
            else:
                owners = passed.places.owners(layer, num_tokens, len(passed.rows))
                row_T = torch.zeros(num_tokens, dtype=torch.long) if owners is None else owners
            for kind, modality in MODALITIES.items():
                counted_T = routed.mask_T & (routed.kind_T == kind) & (row_T >= 0)
                if not counted_T.any():
                    continue
                tally = self.tallies.setdefault((layer, name, modality), Tally(num_experts))
                is_text = layer[0] == "text" and kind == TEXT
                tally.add(routed, counted_T, row_T + first, classes if is_text else None)

    def _classes(self, passed: PassedBatch) -> list[str]:
        """The class of words of each token of the LLM; "" for images and padding."""
        found: list[str] = []
        for index, row in enumerate(passed.rows):
            ids, mask = passed.batch["input_ids"][index], passed.batch["attention_mask"][index].bool()
            is_text = mask & ~passed.is_image[index]
            tokens = read_tokens(self.processor.tokenizer, ids[is_text].tolist(), text_of(row))
            kinds = iter(tokens)
            found += [next(kinds).kind if is_word else "" for is_word in is_text.tolist()]
            if (sample := passed.samples[index]) is not None:
                self._write_tokens(sample, tokens, is_text, mask, passed.is_image[index])
        return found

    def _write_tokens(
        self, sample: Sample, tokens: list[Token], is_text: Tensor, mask: Tensor, is_image: Tensor
    ) -> None:
        """What is shown of a sample's text: its tokens, and one None for each run of image tokens."""
        words, was_image = iter(tokens), False
        for is_word, is_real, is_of_image in zip(is_text.tolist(), mask.tolist(), is_image.tolist(), strict=True):
            if is_word and len(sample.tokens) < MAX_TOKENS:
                sample.tokens.append(next(words))
            elif is_real and is_of_image and not was_image:
                sample.tokens.append(None)
            was_image = is_real and is_of_image

    def _keep(self, passed: PassedBatch) -> None:
        """Keeps what is shown of a pass."""
        for index, sample in enumerate(passed.samples):
            if sample is not None:
                owned = [place for place, picture in enumerate(passed.places.pictures) if picture.row == index]
                sample.pictures = [passed.places.pictures[place] for place in owned]
                for layer, routed in passed.routed.items():
                    self._keep_layer(sample, passed, index, owned, layer, routed)
                self.samples.append(sample)

    def _keep_layer(
        self, sample: Sample, passed: PassedBatch, index: int, owned: list[int], layer: Layer, routed: Routed
    ) -> None:
        """Which expert each token and each patch of a sample went to in one layer."""
        first_T, image_tokens = routed.first_T, None
        if layer[0] == "text":
            image_tokens = passed.is_image.flatten().nonzero().flatten()
            first_BS = first_T.view(len(passed.rows), -1)
            is_text = passed.batch["attention_mask"][index].bool() & ~passed.is_image[index]
            words = iter(first_BS[index][is_text].tolist())
            sample.experts[layer] = [-1 if token is None else next(words) for token in sample.tokens]
        grids = passed.places.grids(layer, len(first_T), image_tokens) if owned else []
        sample.patches[layer] = []
        for place in owned:
            grid = grids[place]
            found = None if grid is None else (grid.rows, grid.columns, first_T[grid.tokens].tolist())
            sample.patches[layer].append(found)
