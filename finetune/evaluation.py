"""Answering questions about images, and the two controls an accuracy is read against.

Shuffled images (each row is given another row's picture) show how much a model could do without looking; the majority
answer shows how much nobody has to look for.
"""

import hashlib
import random
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from datasets import Dataset
from transformers.utils import logging as host_logging

from .collator import ChatCollator
from .metrics import VQAExactMatch, normalize_answer
from .rows import where_is

Rows: TypeAlias = Dataset | Sequence[Mapping[str, Any]]
ALL = ""


def reference_answer(row: Mapping[str, Any]) -> str:
    """What the assistant says last.

    Raises:
        ValueError: if the last message is not the assistant's.
    """
    message = row["messages"][-1]
    if message["role"] != "assistant":
        raise ValueError(
            f"{where_is(row)} ends with a message of {message['role']!r}; expected the assistant's answer."
        )
    content = message["content"]
    return content if isinstance(content, str) else "".join(part["text"] for part in content if part["type"] == "text")


def image_key(image: Any) -> Any:
    """What tells two images apart: path, bytes, or the object itself."""
    if isinstance(image, Mapping):
        stored = image.get("bytes")
        return hashlib.sha1(stored).hexdigest() if stored else image.get("path")
    return image if isinstance(image, str) else id(image)


def shuffled_images(dataset: Rows, seed: int = 0) -> list[list[Any]]:
    """Images for each row, taken from a row with other images and as many of them; rows without images keep none.

    Args:
        dataset: rows with `images`.
        seed: of the permutation.

    Raises:
        ValueError: if some rows' images are so common that others cannot be found for all.
    """
    images = [list(row.get("images") or []) for row in dataset]
    shuffled: list[list[Any]] = [[] for _ in images]
    for num_images in sorted({len(own) for own in images} - {0}):
        rows = [index for index, own in enumerate(images) if len(own) == num_images]
        for index, other in zip(rows, _others(rows, images, seed), strict=True):
            shuffled[index] = images[other]
    return shuffled


def _others(rows: list[int], images: list[list[Any]], seed: int) -> list[int]:
    """For each row one with other images: rows of equal images stand together, all move on by the longest run."""
    draw = random.Random(seed)
    keys = {index: tuple(image_key(image) for image in images[index]) for index in rows}
    runs = Counter(keys.values())
    longest = max(runs.values())
    if 2 * longest > len(rows):
        raise ValueError(
            f"Images cannot be shuffled: {longest} of {len(rows)} rows with {len(keys[rows[0]])} images have the "
            "same ones. Give more rows with other images."
        )
    place = {key: draw.random() for key in runs}
    order = sorted(rows, key=lambda index: (place[keys[index]], draw.random()))
    other = {index: order[(position + longest) % len(order)] for position, index in enumerate(order)}
    return [other[index] for index in rows]


def _batches(dataset: Rows, images: list[list[Any]] | None, size: int) -> Iterator[list[Mapping[str, Any]]]:
    for start in range(0, len(dataset), size):
        rows: list[Mapping[str, Any]] = [dataset[i] for i in range(start, min(start + size, len(dataset)))]
        yield rows if images is None else [{**row, "images": images[start + i]} for i, row in enumerate(rows)]


@torch.no_grad()
def generate_answers(
    model: Any,
    processor: Any,
    dataset: Rows,
    batch_size: int = 32,
    max_new_tokens: int = 16,
    images: list[list[Any]] | None = None,
) -> list[str]:
    """Greedy answers to the rows' last question, in order.

    Args:
        images: given in the place of the rows' own.
    """
    collator = ChatCollator(processor, padding_side="left")
    was_training = model.training
    model.eval()
    answers = []
    bar = host_logging.tqdm(total=len(dataset), desc="Answering", leave=False, disable=None)
    for rows in _batches(dataset, images, batch_size):
        inputs = {name: value.to(model.device) for name, value in collator.prompts(rows).items()}
        given = model.generate(
            **inputs, max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=processor.tokenizer.pad_token_id
        )
        new = given[:, inputs["input_ids"].shape[1] :]
        answers += [text.strip() for text in processor.batch_decode(new, skip_special_tokens=True)]
        bar.update(len(rows))
    bar.close()
    model.train(was_training)
    return answers


def _groups(dataset: Rows, column: str | None) -> list[str] | None:
    """Each row's kind; None where no row has one.

    Raises:
        ValueError: if some rows have one and others do not.
    """
    groups = [None if column is None else row.get(column) for row in dataset]
    without = [index for index, group in enumerate(groups) if group is None]
    if without and len(without) < len(groups):
        raise ValueError(
            f"{where_is(dataset[without[0]])} has no {column!r}, as {len(without)} of {len(groups)}; give every row "
            "one, or group_column=None."
        )
    return None if without or not groups else [str(group) for group in groups]


def evaluate_vqa(
    model: Any,
    processor: Any,
    dataset: Rows,
    *,
    batch_size: int = 32,
    max_new_tokens: int = 16,
    group_column: str | None = "kind",
    shuffle_images: bool = False,
    seed: int = 0,
) -> dict[str, Any]:
    """Exact-match accuracy of greedy answers.

    Args:
        model: a vlmoe model, also wrapped by PEFT.
        processor: its processor.
        dataset: rows of `load_chat_data`, or a list of such rows, whose images may be PIL images; the last message is
            the answer.
        group_column: the column that names each question's kind, where rows have it.
        shuffle_images: whether every row is given another row's images, the control for answers from text alone.
        seed: of that permutation.

    Returns:
        What `VQAExactMatch` computes, and the `predictions`.
    """
    references, groups = [reference_answer(row) for row in dataset], _groups(dataset, group_column)
    images = shuffled_images(dataset, seed) if shuffle_images else None
    predictions = generate_answers(model, processor, dataset, batch_size, max_new_tokens, images)
    result = VQAExactMatch().compute(predictions=predictions, references=references, groups=groups)
    return result | {"predictions": predictions}


def majority_baseline(train: Rows, test: Rows, group_column: str | None = "kind") -> dict[str, Any]:
    """The accuracy of always giving each kind's most frequent answer in training (a new kind gets the overall one).

    Returns:
        What `VQAExactMatch` computes, and the `predictions`, normalised as it compares them.

    Raises:
        ValueError: if there is nothing to count.
    """
    if not len(train):
        raise ValueError("The rows to count answers in are empty; give those that were trained on.")
    counts: dict[str, Counter] = {ALL: Counter()}
    for row, group in zip(train, _groups(train, group_column) or [ALL] * len(train), strict=True):
        answer = normalize_answer(reference_answer(row))
        counts[ALL][answer] += 1
        if group != ALL:
            counts.setdefault(group, Counter())[answer] += 1
    groups = _groups(test, group_column)
    chosen = [counts.get(group, counts[ALL]).most_common(1)[0][0] for group in groups or [ALL] * len(test)]
    references = [reference_answer(row) for row in test]
    return VQAExactMatch().compute(predictions=chosen, references=references, groups=groups) | {"predictions": chosen}
