"""Fine-tuning, top to bottom: recipe, checks, data, model, transformers' Trainer, result.

>>> finetune(parse_recipe("lora", ["model=my-vlmoe", "data=qa.jsonl", "output_dir=tuned"]))
PosixPath('tuned')
"""

import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import PreTrainedModel, Trainer, set_seed

from modeling_vlmoe.model_cards import write_card

from .adapters import check_lora, prepare_model
from .arguments import FinetuneArguments
from .checkpoint_cards import CheckpointCards
from .checkpoints import (
    check_base,
    check_processor,
    load_base,
    load_base_config,
    load_processor,
    merge_adapter,
    save_finetuned,
    write_settings,
)
from .collator import ChatCollator, check_rows
from .data import load_chat_data
from .loss_follower import follow_trainer
from .planning import RunMemory, explained
from .run_folder import check_images_stay, check_output_folder, empty_folder, make_folder, resume_point

logger = logging.getLogger(__name__)

MERGED = "merged"


def load_datasets(args: FinetuneArguments) -> tuple[Dataset, Dataset | None]:
    """The rows to train and to evaluate on.

    Raises:
        ValueError: naming the row that is wrong.
    """
    train = load_chat_data(args.data, args.train_split)
    if args.eval_data is not None:
        return train, load_chat_data(args.eval_data, args.eval_split or "test")
    if args.eval_split is not None:
        if Path(args.data).is_file():
            raise ValueError(
                f"eval_split is {args.eval_split}, but data is the single file {args.data}; give eval_data."
            )
        return train, load_chat_data(args.data, args.eval_split)
    if str(getattr(args.eval_strategy, "value", args.eval_strategy)) != "no":
        raise ValueError("eval_strategy is on, but there is nothing to evaluate on; give eval_data or eval_split.")
    return train, None


def check_datasets(args: FinetuneArguments, processor: Any, train: Dataset, test: Dataset | None) -> None:
    """Goes over all rows for what cannot be learnt, and for images that emptying the output folder would delete.

    Raises:
        ValueError: naming the first row or image.
    """
    for rows in (train, test):
        if rows is not None:
            check_rows(rows, processor, args.max_length, needs_images=rows is train and args.method == "align")
            if args.force and args.folder.is_dir():
                check_images_stay(args, rows)


def build_trainer(
    model: PreTrainedModel,
    processor: Any,
    train_dataset: Any,
    args: FinetuneArguments,
    eval_dataset: Any = None,
    compute_metrics: Callable[[Any], dict[str, float]] | None = None,
) -> Trainer:
    """A Trainer over rows of chat data, with the recipe's parameters trainable and the experts' load logged.

    Args:
        model: a vlmoe model; `trainer.model` is a `PeftModel` around it for `lora`.
        processor: its processor, which every checkpoint keeps.
        train_dataset: rows as `load_chat_data` gives them, or a list of them.
        args: the recipe.
        eval_dataset: rows for `trainer.evaluate`, which gives the loss and what `compute_metrics` makes of the logits.
        compute_metrics: as transformers' Trainer takes it.
    """
    check_lora_if_asked(model.config, args)
    check_processor(processor, model.config)
    trainer = Trainer(
        model=prepare_model(model, args),
        args=args,
        data_collator=ChatCollator(processor, args.max_length),
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        processing_class=processor,
        compute_metrics=compute_metrics,
    )
    follow_trainer(trainer, args.log_router_load, args.router_alarms)
    trainer.add_callback(CheckpointCards(args, len(train_dataset)))
    return trainer


def check_lora_if_asked(config: Any, args: FinetuneArguments) -> None:
    """Refuses early what PEFT would refuse late."""
    if args.method == "lora":
        check_lora(config, args)


def count_parameters(model: Any) -> tuple[int, int]:
    """Trainable and all parameters."""
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
    return sum(size for size, is_trained in sizes if is_trained), sum(size for size, _ in sizes)


def finetune(args: FinetuneArguments, say: Callable[[str], None] | None = None) -> Path:
    """Runs a recipe and writes its result to `args.output_dir`.

    Args:
        args: the recipe.
        say: takes a line on the memory that a step will take, before the weights are read; None estimates none.

    Returns:
        The folder: a full checkpoint for `align`, an adapter for `lora` (with `merged/` in it if asked), the processor
        and `finetune_settings.yaml`, beside the Trainer's own checkpoints and logs.

    Raises:
        ValueError: for whatever the user can mend, before training where it can be known; and where memory runs out,
            saying what took it.
    """
    if args.process_index == 0:  # other processes may find what this one has begun to write
        check_output_folder(args)
    if Path(args.model).is_dir():
        args.model = str(Path(args.model).resolve())  # the adapter names it, and is read from other folders
    config = load_base_config(args.model, **args.hub)
    check_base(config, args.model)
    check_lora_if_asked(config, args)
    processor = load_processor(args.model, config, **args.hub)
    train, test = load_datasets(args)
    check_datasets(args, processor, train, test)
    folder = args.folder
    make_folder(folder)
    memory = RunMemory(config, processor, train, args)
    if say is not None and args.process_index == 0:
        say(memory.before())
    with explained(memory):
        _train(args, processor, train, test)
    if args.method == "lora" and args.merge and args.process_index == 0:
        shutil.rmtree(folder / MERGED, ignore_errors=True)
        merge_adapter(folder, folder / MERGED, dtype=args.dtype, trust_remote_code=args.trust_remote_code)
    return folder


def _train(args: FinetuneArguments, processor: Any, train: Dataset, test: Dataset | None) -> None:
    """Reads the weights, trains, and writes what was tuned."""
    folder, checkpoint = args.folder, resume_point(args)
    set_seed(args.seed)
    model = load_base(args.model, args.dtype, args.experts_implementation, **args.hub)
    if args.process_index == 0:
        if args.force:
            empty_folder(folder)
        write_settings(folder, args)
    trainer = build_trainer(model, processor, train, args, test)
    logger.info("Training %d of %d parameters.", *count_parameters(trainer.model))
    trainer.train(resume_from_checkpoint=checkpoint)
    if trainer.is_world_process_zero():
        model = trainer.accelerator.unwrap_model(trainer.model)
        save_finetuned(model, processor, folder, args, len(train), trainer.state)
    if test is not None:
        trainer.save_metrics("eval", trainer.evaluate())
        if trainer.is_world_process_zero():
            write_card(folder)
