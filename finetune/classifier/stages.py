"""The runs of one seed: a dense model, which goes on as the control, and the sparse model that is made of it.

    seed-0/dense-start/model   the dense model
    seed-0/dense/              the control: the same model, trained on for as many epochs as the sparse one
    seed-0/sparse/             the sparse model, and where it sends each task's tokens

Each has `result.json`, `history.json`, `report.txt`, `confusion.png` and its `model`, which holds the processor too.
"""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import AutoModelForSequenceClassification, AutoProcessor, set_seed

from modeling_vlmoe import VLMoEForSequenceClassification

from .arguments import ClassifyArguments
from .data import Data
from .models import build_processor, dense_config, is_gated, silence_gates, upcycle_classifier
from .pictures import ROUTING, draw_routing
from .routing import routing_by_task
from .scores import CONFUSION, REPORT, accuracy_by_task, draw_confusion, write_report
from .training import predict_labels, train_classifier

START, DENSE, SPARSE = "dense-start", "dense", "sparse"
MODEL, RESULT = "model", "result.json"
Say = Callable[[str], None]


def stage_folder(root: Path, seed: int, stage: str) -> Path:
    """Where a run of a seed leaves what it made."""
    return root / f"seed-{seed}" / stage


def read_result(root: Path, seed: int, stage: str) -> dict[str, Any]:
    """What a run found."""
    return json.loads((stage_folder(root, seed, stage) / RESULT).read_text(encoding="utf-8"))


def starting_model(root: Path, args: ClassifyArguments, data: Data, seed: int, stage: str) -> tuple[Any, Any]:
    """The model that a run trains, and its processor: new, or made of the dense one."""
    set_seed(seed)
    if stage == START:
        processor: Any = build_processor(args, data)
        return VLMoEForSequenceClassification(dense_config(args, processor, data.labels)), processor
    folder = stage_folder(root, seed, START) / MODEL
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    processor = AutoProcessor.from_pretrained(folder)
    if stage == SPARSE:
        model = upcycle_classifier(model, args)
        processor.marks_visible_text = is_gated(model)
    return model, processor


def run_stage(root: Path, args: ClassifyArguments, data: Data, seed: int, stage: str, say: Say) -> dict[str, Any]:
    """Trains and judges one model, and writes all that it leaves.

    Args:
        root: the command's folder.
        args: its settings.
        data: the rows.
        seed: of weights and batches.
        stage: which of the three.
        say: takes a line per epoch.

    Returns:
        `accuracy` by task, `parameters`, `seconds`; of the sparse model also `routing`, and where it has text gates
        `silent`, its accuracy by task without what they add.
    """
    began = time.perf_counter()
    folder = stage_folder(root, seed, stage)
    model, processor = starting_model(root, args, data, seed, stage)
    epochs = args.dense_epochs if stage == START else args.epochs
    trainer = train_classifier(model, processor, data, args, folder, seed, epochs, say)
    seconds = time.perf_counter() - began
    predicted = predict_labels(trainer, data)
    write_report(folder / REPORT, data, predicted)
    draw_confusion(folder / CONFUSION, data, predicted)
    result: dict[str, Any] = {
        "accuracy": accuracy_by_task(data.test, predicted, data.tasks),
        "parameters": model.num_parameters(),
        "seconds": seconds,
    }
    if stage == SPARSE:
        result["routing"] = routing_by_task(model, processor, data)
        draw_routing(folder / ROUTING, result["routing"])
        if is_gated(model):
            with silence_gates(model):
                result["silent"] = accuracy_by_task(data.test, predict_labels(trainer, data), data.tasks)
    model.save_pretrained(folder / MODEL)
    processor.save_pretrained(folder / MODEL)
    (folder / RESULT).write_text(json.dumps(result, indent=1), encoding="utf-8")
    return result
