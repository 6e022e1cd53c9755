"""The demo's stages. Each reads the folders that earlier ones wrote and writes its own, with a `result.json`.

    parents/text, parents/vision     the dense parents
    data                             pictures and questions; blind/ holds the questions without pictures
    sparse/start, dense/start        the upcycled model, and the same function without experts
    sparse, dense, blind, equal_time align/ and tuned/ (adapter, merged/), and the accuracies

Several stages run one after another in one process with one thread:

    python -m modeling_vlmoe.finetune.demo.stages --stages vision data --output-dir demo-output --seed 0
"""

import json
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor, HfArgumentParser

from modeling_vlmoe.conversion import UpcycleArguments, upcycle
from modeling_vlmoe.conversion.receipt import RECEIPT_NAME
from modeling_vlmoe.moe_config import PARTS

from ..arguments import parse_settings, read_recipe
from ..data import load_chat_data
from ..evaluation import evaluate_vqa, majority_baseline
from ..train import finetune
from .parent_cards import write_parent_card
from .parents import pretrain_text, pretrain_vision
from .picture import draw_picture
from .routing import routing_report
from .settings import DemoSettings
from .write_data import write_blind, write_dataset

RESULT = "result.json"
DATA, BLIND = "data", "blind"
TEXT_PARENT, VISION_PARENT = "parents/text", "parents/vision"
EVAL_BATCH = 200
MAX_ANSWER_TOKENS = 4
TUNED = "sparse/tuned/merged"  # the result


def read_result(root: Path, stage: str) -> dict[str, Any]:
    """What a stage found."""
    return json.loads((root / stage / RESULT).read_text(encoding="utf-8"))


def load_model(folder: Path) -> tuple[Any, Any]:
    """A model and its processor."""
    return AutoModelForImageTextToText.from_pretrained(folder), AutoProcessor.from_pretrained(folder)


def make_text(root: Path, settings: DemoSettings) -> dict[str, Any]:
    accuracy = pretrain_text(root / TEXT_PARENT, settings)
    write_parent_card(root / TEXT_PARENT, "A small LLM")
    return {"accuracy": accuracy}


def make_vision(root: Path, settings: DemoSettings) -> dict[str, Any]:
    accuracy = pretrain_vision(root / VISION_PARENT, settings)
    write_parent_card(root / VISION_PARENT, "A small ViT")
    return {"accuracy": accuracy}


def make_data(root: Path, settings: DemoSettings) -> dict[str, Any]:
    write_dataset(root / DATA, settings)
    for split in ("train", "test"):
        write_blind(root / DATA / f"{split}.jsonl", root / BLIND / f"{split}.jsonl")
    train, test = (load_chat_data(root / DATA / f"{split}.jsonl") for split in ("train", "test"))
    return {"majority": without_predictions(majority_baseline(train, test))}


def make_upcycled(root: Path, settings: DemoSettings) -> dict[str, Any]:
    """The dense parents become a sparse model, proved equal on the written files."""
    experts = {f"{part}_experts": getattr(settings, f"{part}_experts") for part in PARTS}
    folder = upcycle_parents(root, "sparse/start", settings, **experts)
    receipt = json.loads((folder / RECEIPT_NAME).read_text(encoding="utf-8"))
    make_dense_start(root, settings)
    return {"proof": receipt["proof"], "parameters": receipt["parameters"]}


def make_dense_start(root: Path, settings: DemoSettings) -> None:
    """The control: the same parents with the same connector, and no experts."""
    upcycle_parents(root, "dense/start", settings, dense=True)


def upcycle_parents(root: Path, output: str, settings: DemoSettings, **options: Any) -> Path:
    """A vision-language model of the demo's two parents."""
    return upcycle(
        UpcycleArguments(
            text_model=str(root / TEXT_PARENT),
            vision_model=str(root / VISION_PARENT),
            output_dir=str(root / output),
            seed=settings.seed,
            **options,
        )
    )


@dataclass(frozen=True)
class Contestant:
    """A model that is tuned and judged.

    Attributes:
        start: folder of the model to tune.
        data: folder of its questions.
        aligned_by: the contestant whose alignment it starts from; itself where None.
        steps: steps of the tuning, from the settings and what earlier stages measured.
    """

    start: str
    data: str = DATA
    aligned_by: str | None = None
    steps: Callable[[Path, DemoSettings], int] = field(default=lambda root, settings: settings.tune_steps)


def equal_time_steps(root: Path, settings: DemoSettings) -> int:
    """Steps that bring the dense model's training to the time that the sparse model's took."""
    sparse, dense = read_result(root, "sparse")["seconds"], read_result(root, "dense")["seconds"]
    time_left = sparse["align"] + sparse["tune"] - dense["align"]
    return max(settings.tune_steps, round(settings.tune_steps * time_left / dense["tune"]))


CONTESTANTS = {
    "sparse": Contestant("sparse/start"),
    "dense": Contestant("dense/start"),
    "blind": Contestant("dense/start", data=BLIND),
    "equal_time": Contestant("dense/align", aligned_by="dense", steps=equal_time_steps),
}


def align(root: Path, settings: DemoSettings, name: str, start: Path) -> Path:
    """Stage 1 of the recipes: the connector alone."""
    return run_recipe(
        "align",
        settings,
        model=start,
        data=root / DATA / "align.jsonl",
        output_dir=root / name / "align",
        max_steps=settings.align_steps,
        per_device_train_batch_size=settings.align_batch_size,
        learning_rate=settings.align_learning_rate,
    )


def tune(root: Path, settings: DemoSettings, name: str, start: Path, steps: int, data: str = DATA) -> Path:
    """Stage 2 of the recipes: LoRA on attention, experts and dense MLPs of both towers; routers and connector
    whole.
    """
    return run_recipe(
        "lora",
        settings,
        model=start,
        data=root / data / "train.jsonl",
        output_dir=root / name / "tuned",
        max_steps=steps,
        per_device_train_batch_size=settings.tune_batch_size,
        learning_rate=settings.tune_learning_rate,
        lora_parts="text,vision",
        lora_r=settings.lora_rank,
        lora_alpha=2 * settings.lora_rank,
        train_connector=data == DATA,
        merge=True,
    )


def run_recipe(recipe: str, settings: DemoSettings, **values: Any) -> Path:
    """A shipped recipe with the demo's sizes; small enough to need neither checkpointing nor accumulation."""
    ours = {
        "seed": settings.seed,
        "activation_checkpointing": False,
        "gradient_accumulation_steps": 1,
        "warmup_steps": 0.05,
        "logging_steps": 25,
        "save_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": True,
        "force": True,
    }
    paths = {key: str(value) if isinstance(value, Path) else value for key, value in values.items()}
    return finetune(parse_settings(read_recipe(recipe) | ours | paths, f"The demo's {recipe} recipe"))


def contest(name: str) -> Callable[[Path, DemoSettings], dict[str, Any]]:
    """The stage that trains and judges one contestant."""

    def stage(root: Path, settings: DemoSettings) -> dict[str, Any]:
        contestant = CONTESTANTS[name]
        start, seconds = root / contestant.start, {"align": 0.0}
        if contestant.aligned_by is not None:
            seconds["align"] = read_result(root, contestant.aligned_by)["seconds"]["align"]
        elif contestant.data == DATA:
            began = time.perf_counter()
            start = align(root, settings, name, start)
            seconds["align"] = time.perf_counter() - began
        steps = contestant.steps(root, settings)
        began = time.perf_counter()
        folder = tune(root, settings, name, start, steps, contestant.data)
        seconds["tune"] = time.perf_counter() - began
        model, processor = load_model(folder / "merged")
        test = load_chat_data(root / contestant.data / "test.jsonl")
        accuracy = evaluate_vqa(model, processor, test, batch_size=EVAL_BATCH, max_new_tokens=MAX_ANSWER_TOKENS)
        return {"accuracy": accuracy, "seconds": seconds, "steps": steps}

    return stage


def judge_shuffled(root: Path, settings: DemoSettings) -> dict[str, Any]:
    """The trained sparse model with every question beside another question's picture."""
    model, processor = load_model(root / TUNED)
    test = load_chat_data(root / DATA / "test.jsonl")
    kwargs: dict[str, Any] = {"batch_size": EVAL_BATCH, "max_new_tokens": MAX_ANSWER_TOKENS}
    accuracy = evaluate_vqa(model, processor, test, shuffle_images=True, seed=settings.seed, **kwargs)
    return {"accuracy": without_predictions(accuracy)}


def report_routing(root: Path, settings: DemoSettings) -> dict[str, Any]:
    """Where the tokens went, how alike the experts are, and the picture of both."""
    model, processor = load_model(root / TUNED)
    test = load_chat_data(root / DATA / "test.jsonl")
    report = routing_report(model, processor, test.select(range(min(EVAL_BATCH, len(test)))))
    predictions = read_result(root, "sparse")["accuracy"]["predictions"]
    draw_picture(root / "demo.png", test, predictions, report)
    return report


def without_predictions(accuracy: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in accuracy.items() if key != "predictions"}


STAGES: dict[str, Callable[[Path, DemoSettings], dict[str, Any]]] = {
    "text": make_text,
    "vision": make_vision,
    "data": make_data,
    "upcycle": make_upcycled,
    **{name: contest(name) for name in CONTESTANTS},
    "shuffled": judge_shuffled,
    "routing": report_routing,
}


@dataclass
class StageArguments:
    """Which stages to run, and where."""

    stages: list[str] = field(metadata={"help": f"Stages, in order: {', '.join(STAGES)}."})
    output_dir: str = field(metadata={"help": "The demo's folder."})


def run_stage(name: str, root: Path, settings: DemoSettings) -> None:
    """Runs one stage and writes its result."""
    began = time.perf_counter()
    result = STAGES[name](root, settings) | {"stage_seconds": time.perf_counter() - began}
    (root / name).mkdir(parents=True, exist_ok=True)
    (root / name / RESULT).write_text(json.dumps(result, indent=1), encoding="utf-8")


def main() -> None:
    """Runs stages in one thread; a stage that cannot go on says why in one line and exits with 2."""
    logging.basicConfig(level=logging.INFO)
    torch.set_num_threads(1)
    kinds: Any = [StageArguments, DemoSettings]
    parser = HfArgumentParser(kinds, description=__doc__)
    arguments, settings = parser.parse_args_into_dataclasses()
    for name in arguments.stages:
        try:
            run_stage(name, Path(arguments.output_dir), settings)
        except ValueError as error:
            parser.exit(2, f"{error}\n")


if __name__ == "__main__":
    main()
