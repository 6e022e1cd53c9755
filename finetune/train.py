"""Fine-tuning, top to bottom: recipe, checks, data, model, transformers' Trainer, result.

>>> finetune(parse_recipe("lora", ["model=my-vlmoe", "data=qa.jsonl", "output_dir=tuned"]))
PosixPath('tuned')
"""

import logging
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import PreTrainedModel, Trainer, set_seed

from modeling_vlmoe.conversion.meta_models import whole_models
from modeling_vlmoe.model_cards import write_card

from .adapters import check_lora, prepare_model
from .arguments import FinetuneArguments
from .chain.schedules import continue_schedule
from .chain.whole_checkpoints import WholeCheckpoints
from .checkpoint_cards import CheckpointCards
from .checkpoints import (
    check_base,
    check_processor,
    load_base,
    load_base_config,
    load_processor,
    merge_adapter,
    write_settings,
)
from .collator import ChatCollator, check_rows
from .loss_follower import follow_trainer
from .planning import RunMemory, explained
from .routing_alarms import alarm_limits
from .run_folder import check_images_stay, check_output_folder, empty_folder, make_folder, resume_point
from .scale.prepare import spread_model, spread_trainer
from .scale.saving import save_result
from .scale.sizes import check_scale, splitting
from .trained.cells import parameter_cells
from .trained.checks import learns_from_images_alone
from .trained.counts import count_cells, num_numbers, table
from .trained.early import check_parts
from .trained.methods import check_delta
from .trained.packing import check_packable, packing
from .trained.trainer import PartsTrainer
from .training_data import ChatStream, go_on, load_datasets, num_rows, plain_worker_errors, rows_to_estimate
from .watch.account import Account, told_in
from .watch.watch import watch_training

logger = logging.getLogger(__name__)

MERGED = "merged"


def check_datasets(args: FinetuneArguments, processor: Any, train: Any, test: Dataset | None) -> None:
    """Goes over all rows for what cannot be learnt, and for images that emptying the output folder would delete.

    Raises:
        ValueError: naming the first row or image.
    """
    if isinstance(train, ChatStream) and args.force and args.folder.is_dir() and any(args.folder.iterdir()):
        raise ValueError(
            f"force=true would empty {args.folder}, but with streaming nobody knows whether it holds images of the "
            "data; empty it yourself, or name another output_dir."
        )
    for rows in (train, test):
        if rows is not None and num_rows(rows) is not None:  # a stream's are checked as they come
            check_rows(rows, processor, args.max_length, needs_images=rows is train and learns_from_images_alone(args))
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
    cells = parameter_cells(model)
    prepared = prepare_model(model, args)
    args.trained = count_cells(prepared, cells)
    trainer = PartsTrainer(
        cells,
        model=spread_model(prepared, args),
        args=args,
        data_collator=ChatCollator(processor, args.max_length),
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        processing_class=processor,
        compute_metrics=compute_metrics,
    )
    spread_trainer(trainer, args)
    follow_trainer(trainer, args.log_router_load, args.router_alarms, alarm_limits(args.watch_steps))
    trainer.add_callback(CheckpointCards(args, num_rows(train_dataset)))
    if args.watch:
        watch_training(trainer, args.watch_steps)
    continue_schedule(trainer, args)
    trainer.add_callback(WholeCheckpoints())
    return trainer


def check_lora_if_asked(config: Any, args: FinetuneArguments) -> None:
    """Refuses early what PEFT would refuse late, and a method that is not the model's."""
    if args.method == "lora":
        check_lora(config, args)
    if args.method == "delta":
        check_delta(config)


def count_parameters(model: Any) -> tuple[int, int]:
    """Trainable and all parameters."""
    sizes = [(num_numbers(parameter), parameter.requires_grad) for parameter in model.parameters()]
    return sum(size for size, is_trained in sizes if is_trained), sum(size for size, _ in sizes)


def tell_counts(args: FinetuneArguments, say: Callable[[str], None] | None) -> None:
    """Says how much of each part is trained, in the log too."""
    counts = table(args.trained or {})
    logger.info("%s", counts)
    if say is not None and args.process_index == 0:
        say(counts)


def finetune(
    args: FinetuneArguments,
    say: Callable[[str], None] | None = None,
    adjust: Sequence[Callable[[Trainer], None]] = (),
) -> Path:
    """Runs a recipe and writes its result to `args.output_dir`.

    Args:
        args: the recipe.
        say: takes a line on the memory that a step will take, before the weights are read, and how much of each part
            is trained; None estimates none.
        adjust: called with the trainer before it trains.

    Returns:
        The folder: an adapter for `lora` (with `merged/` in it if asked), else a full checkpoint; the processor
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
    check_packable(config, args)
    check_parts(config, args)
    check_scale(args, config)
    processor = load_processor(args.model, config, **args.hub)
    train, test = load_datasets(args)
    if isinstance(train, ChatStream):
        go_on(train, args, resume_point(args))
    check_datasets(args, processor, train, test)
    folder = args.folder
    make_folder(folder)
    memory = RunMemory(config, processor, rows_to_estimate(train), args)
    if say is not None and args.process_index == 0:
        say(memory.before())
    with told_in(folder), explained(memory):
        _train(args, processor, train, test, [lambda trainer: tell_counts(args, say), *adjust])
    if args.method == "lora" and args.merge and args.process_index == 0:
        shutil.rmtree(folder / MERGED, ignore_errors=True)
        with whole_models():
            merge_adapter(folder, folder / MERGED, dtype=args.dtype, trust_remote_code=args.trust_remote_code)
    if say is not None and args.process_index == 0 and (alarms := Account.read(folder).listed()):
        say(alarms)
    return folder


def _train(
    args: FinetuneArguments,
    processor: Any,
    train: Any,
    test: Dataset | None,
    adjust: Sequence[Callable[[Trainer], None]],
) -> None:
    """Reads the weights, trains, and writes what was tuned."""
    folder, checkpoint = args.folder, resume_point(args)
    set_seed(args.seed)
    given = {**args.hub, **packing(args), **splitting(args)}
    model = load_base(args.model, args.dtype, args.experts_implementation, **given)
    set_seed(args.seed)  # reading draws numbers under ZeRO-3: an adapter begins alike everywhere
    if args.process_index == 0:
        if args.force:
            empty_folder(folder)
        write_settings(folder, args)
    trainer = build_trainer(model, processor, train, args, test)
    logger.info("Training %d of %d parameters.", *count_parameters(trainer.model))
    for one in adjust:
        one(trainer)
    with plain_worker_errors():
        trainer.train(resume_from_checkpoint=checkpoint)
    save_result(trainer, processor, args, num_rows(train))
    if test is not None:
        trainer.save_metrics("eval", trainer.evaluate())
        if trainer.is_world_process_zero():
            write_card(folder)
