"""Writes the demo's scenes as a chat-format image-text dataset, as a user would bring one: pictures and JSON lines.

    images/train-00000.png ...
    align.jsonl   requests to describe training scenes, and questions on them, for the connector
    train.jsonl   questions on training scenes
    test.jsonl    questions on held-out scenes

Image paths are relative to the folder. A row:

    {"messages": [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Where is the circle?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "top-left"}]}
    ], "images": ["images/train-00000.png"], "kind": "place"}
"""

import json
from pathlib import Path

import numpy as np

from .scenes import DESCRIBE, QuestionBank, Sample, describe, render, split_scenes
from .settings import DemoSettings

IMAGE_FOLDER = "images"


def chat_row(question: str, answer: str, image: str, kind: str) -> dict:
    """Builds one row: an image and a question from the user, an answer from the assistant.

    Args:
        question: The user's text, after the image.
        answer: The assistant's text.
        image: Path of the picture, relative to the dataset's folder.
        kind: Kind of question, for the evaluation.
    """
    user = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}
    assistant = {"role": "assistant", "content": [{"type": "text", "text": answer}]}
    return {"messages": [user, assistant], "images": [image], "kind": kind}


def to_captions(samples: list[Sample]) -> list[Sample]:
    """Replaces each question by the request to describe its scene."""
    return [Sample(sample.scene, "describe", DESCRIBE, describe(sample.scene)) for sample in samples]


def write_split(output_dir: Path, name: str, samples: list[Sample], rng: np.random.Generator) -> Path:
    """Renders one picture per sample and writes `<name>.jsonl`.

    Args:
        output_dir: The dataset's folder.
        name: Name of the split.
        samples: Its questions, in the order of the rows.
        rng: Generator of the rendering.

    Returns:
        Path of the JSON lines file.
    """
    (output_dir / IMAGE_FOLDER).mkdir(parents=True, exist_ok=True)
    path = output_dir / f"{name}.jsonl"
    with path.open("w", encoding="utf-8") as file:
        for index, sample in enumerate(samples):
            image = f"{IMAGE_FOLDER}/{name}-{index:05d}.png"
            render(sample.scene, rng).save(output_dir / image, compress_level=1)
            file.write(json.dumps(chat_row(sample.question, sample.answer, image, sample.kind)) + "\n")
    return path


def write_dataset(output_dir: Path, settings: DemoSettings) -> None:
    """Writes the align, train and test splits; the test split's scenes are in no other.

    Args:
        output_dir: The dataset's folder.
        settings: Seed and numbers of rows.
    """
    rng = np.random.default_rng(settings.seed)
    train_scenes, held_out_scenes = split_scenes(settings.seed, settings.held_out_share)
    train_bank, test_bank = QuestionBank(train_scenes), QuestionBank(held_out_scenes)
    align = train_bank.balanced(settings.num_align, rng)
    num_described = round(settings.align_describe_share * len(align))
    align = to_captions(align[:num_described]) + align[num_described:]
    write_split(output_dir, "align", [align[i] for i in rng.permutation(len(align))], rng)
    write_split(output_dir, "train", train_bank.balanced(settings.num_train, rng), rng)
    write_split(output_dir, "test", test_bank.balanced(settings.num_test, rng), rng)


def write_blind(source: Path, target: Path) -> Path:
    """Writes a split again without its pictures: what can be learnt from the questions alone.

    Args:
        source: JSON lines file of a split.
        target: JSON lines file to write.

    Returns:
        The target.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    with source.open(encoding="utf-8") as rows, target.open("w", encoding="utf-8") as file:
        for row in map(json.loads, rows):
            user, *rest = row["messages"]
            words = [part for part in user["content"] if part["type"] == "text"]
            file.write(json.dumps(row | {"messages": [user | {"content": words}, *rest], "images": []}) + "\n")
    return target
