"""When to upcycle, and with which experts: sparse from the start, after the dense model was tuned, or never.

Run: python -m benchmarks.orders --output-dir orders-rows

The rows are fixed here, before any is run. Each has the demo's parents, LLM with 8 experts, ViT and connector with 4,
and three stages: the connector alone, then all weights twice, 100 + 150 + 150 steps of 32 rows, the last two drawn
from 1000 questions, so that each is seen about ten times. Every stage has a learning-rate schedule of its own.
Parents, questions, batches, steps and rates follow from the seed, so that a seed's rows have seen the same tokens in
the same order. Judged on 2000 questions on held-out scenes: the answer's negative log-likelihood per token, and exact
matches.

    dense control    never sparse
    upcycle first    sparse in all three stages
    dense first      sparse in the last stage: the tuned dense model is upcycled
    ..., delta       the same with delta experts (a shared base and pairs of rank 8) in the place of whole ones

Claims that this looks at: an upcycled model beats dense training at equal tokens (2410.07524); dense first, then
upcycled, beats sparse at once (MoE-LLaVA, 2401.15947); low-rank deltas are as good as whole copies (DeRS, 2503.01359).
Finished rows are kept: a run that was stopped goes on.
"""

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainingArguments, set_seed

from benchmarks.routing import BUDGET, SEEDS, judge_answers, prepare, results, spread
from modeling_vlmoe.conversion import UpcycleArguments, upcycle
from modeling_vlmoe.finetune import follow_trainer
from modeling_vlmoe.finetune.collator import ChatCollator
from modeling_vlmoe.finetune.data import load_chat_data
from modeling_vlmoe.finetune.demo.settings import DemoSettings
from modeling_vlmoe.finetune.demo.stages import DATA, RESULT, align, load_model, upcycle_parents
from modeling_vlmoe.moe_config import PARTS

STEPS = 150  # of each of the two stages that train all weights
LEARNING_RATE = 5e-4
RANK = 8
DELTA = {"expert_init": "delta", "expert_rank": RANK}
CONTROL = "dense control"


@dataclass(frozen=True)
class Order:
    """Which stages a model is sparse in.

    Attributes:
        sparse_from: the stage before which it is upcycled: 0 the connector's, 2 the last; None for never.
        options: of `vlmoe upcycle`, beside the numbers of experts.
    """

    sparse_from: int | None
    options: dict[str, Any]


ORDERS = {
    CONTROL: Order(None, {}),
    "upcycle first": Order(0, {}),
    "upcycle first, delta": Order(0, DELTA),
    "dense first": Order(2, {}),
    "dense first, delta": Order(2, DELTA),
}


def train_all(start: Path, output: Path, data: Path, seed: int) -> Path:
    """A stage that trains every weight; one row's stages see other batches, and all rows the same."""
    set_seed(seed)
    model, processor = load_model(start)
    args = TrainingArguments(
        str(output), max_steps=STEPS, per_device_train_batch_size=DemoSettings.tune_batch_size, seed=seed,
        learning_rate=LEARNING_RATE, lr_scheduler_type="cosine", warmup_steps=0.05, logging_steps=25, use_cpu=True,
        save_strategy="no", report_to="none", remove_unused_columns=False, disable_tqdm=True, label_names=["labels"],
        dataloader_pin_memory=False,
    )  # fmt: skip
    trainer = Trainer(
        model,
        args,
        data_collator=ChatCollator(processor),
        train_dataset=load_chat_data(data),
        processing_class=processor,
    )
    follow_trainer(trainer)
    trainer.train()
    trainer.save_model(str(output))
    return output


def run_order(name: str, root: Path, settings: DemoSettings) -> dict[str, Any]:
    """Makes, trains and judges one row."""
    order, folder = ORDERS[name], root / name
    experts = {f"{part}_experts": getattr(settings, f"{part}_experts") for part in PARTS} | order.options
    is_sparse = order.sparse_from == 0
    start = upcycle_parents(root, f"{name}/start", settings, force=True, **(experts if is_sparse else {"dense": True}))
    questions = root / DATA / "train.jsonl"
    stages: list[Callable[[Path], Path]] = [
        lambda model: align(root, settings, name, model),
        lambda model: train_all(model, folder / "first", questions, 2 * settings.seed),
        lambda model: train_all(model, folder / "second", questions, 2 * settings.seed + 1),
    ]
    for number, stage in enumerate(stages):
        if number and number == order.sparse_from:
            args = UpcycleArguments(
                vlm_model=str(start), output_dir=str(folder / "upcycled"), seed=settings.seed, force=True, **experts
            )
            start = upcycle(args)
        start = stage(start)
    model, processor = load_model(start)
    found = judge_answers(model, processor, load_chat_data(root / DATA / "test.jsonl"))
    return found | {"parameters": sum(parameter.numel() for parameter in model.parameters())}


def show(root: Path) -> None:
    """Prints what there is: means over seeds and standard deviations, and the same of the difference to the control
    of each seed.
    """
    control = results(root, CONTROL)
    heads = ("order", "seeds", "parameters", "answer NLL", "accuracy", "NLL above control", "accuracy above control")
    print(f"| {' | '.join(heads)} |\n{'|---' * len(heads)}|")
    for name in ORDERS:
        if not (found := results(root, name)):
            continue
        cells = [f"{next(iter(found.values()))['parameters']:,}"]
        cells += [spread([one[key] for one in found.values()]) for key in ("nll", "accuracy")]
        for key in ("nll", "accuracy"):
            above = [one[key] - control[seed][key] for seed, one in found.items() if seed in control]
            cells.append(spread(above) if above else "")
        print(f"| {name} | {len(found)} | {' | '.join(cells)} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output-dir", required=True, type=Path)
    parser.add_argument("--rows", nargs="+", default=list(ORDERS), choices=list(ORDERS))
    parser.add_argument("--seeds", nargs="*", type=int, default=list(SEEDS), help="none: print what there is")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    for seed in args.seeds:
        root, settings = args.output_dir / f"seed-{seed}", DemoSettings(seed=seed, **BUDGET)
        prepare(root, settings)
        for name in args.rows:
            result = root / name / RESULT
            if not result.is_file():
                found = run_order(name, root, settings)
                result.write_text(json.dumps(found))
    show(args.output_dir)


if __name__ == "__main__":
    main()
