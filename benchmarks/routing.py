"""Six ways to route, from the demo's parents, on few questions: what each learns, and what becomes of its experts.

Run: python -m benchmarks.routing --output-dir routing-rows

The rows are fixed here, before any is run. Each upcycles the same parents (LLM 8 experts, ViT and connector 4), trains
the connector, then LoRA on attention and experts with routers and connector whole, as the demo does, on as many
tokens: 100 and 300 steps of 32 rows, the second drawn from 1000 questions, so that each is seen about ten times.
Judged on 2000 questions on held-out scenes: the answer's negative log-likelihood per token, and exact matches.
Parents, split and batches follow from the seed, so that a seed's rows differ in nothing else. Finished rows are kept:
a run that was stopped goes on.

`dead` is the share of experts that get less than a tenth of an even share of a layer's tokens over those questions;
`imbalance` the largest share of a layer's tokens that one expert gets, times the experts (1 when even), averaged over
layers.
"""

import argparse
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from modeling_vlmoe.finetune.collator import ChatCollator
from modeling_vlmoe.finetune.data import load_chat_data
from modeling_vlmoe.finetune.demo.settings import DemoSettings
from modeling_vlmoe.finetune.demo.stages import (
    DATA,
    EVAL_BATCH,
    MAX_ANSWER_TOKENS,
    RESULT,
    TEXT_PARENT,
    VISION_PARENT,
    align,
    load_model,
    make_text,
    make_vision,
    tune,
    upcycle_parents,
)
from modeling_vlmoe.finetune.demo.write_data import write_dataset
from modeling_vlmoe.finetune.evaluation import evaluate_vqa
from modeling_vlmoe.finetune.router_load import RouterLoad, find_body
from modeling_vlmoe.moe_config import PARTS
from modeling_vlmoe.parts import blocks_of
from modeling_vlmoe.routers import Router

BUDGET = {"num_train": 1000, "tune_steps": 300, "num_align": 3200, "align_steps": 100, "num_test": 2000}
SEEDS = (0, 1, 2)
OPTIONS = {"num_experts_per_tok": "top_k", "router_type": "router"}  # fields with an option of their own
DEAD_BELOW = 0.1
BALANCE = 0.01  # the default of ours, whose value is 1 when routing is even; transformers' is top-k then


@dataclass(frozen=True)
class Row:
    """One way to route.

    Attributes:
        parts: of each part, the fields of its `MoEConfig` that are not the default.
        is_pooled: whether balance is transformers' loss, of all a tower's layers together, in the place of ours, of
            each layer apart.
    """

    parts: dict[str, dict[str, Any]] = field(default_factory=dict)
    is_pooled: bool = False

    def options(self, settings: DemoSettings) -> dict[str, Any]:
        """What `vlmoe upcycle` is told."""
        options = {f"{part}_experts": getattr(settings, f"{part}_experts") for part in PARTS}
        for part, fields in self.parts.items():
            options |= {f"{part}_{OPTIONS[name]}": value for name, value in fields.items() if name in OPTIONS}
            options[f"{part}_moe"] = {name: value for name, value in fields.items() if name not in OPTIONS} or None
        return options


def in_all(**fields: Any) -> dict[str, dict[str, Any]]:
    """The same fields in every part."""
    return dict.fromkeys(PARTS, fields)


ROWS = {
    "plain": Row(),
    "no balance": Row(in_all(router_aux_loss_coef=0.0)),
    "pooled balance": Row(in_all(router_aux_loss_coef=0.0), is_pooled=True),
    "top-1": Row(in_all(num_experts_per_tok=1)),
    "raw": Row(in_all(norm_topk_prob=False)),
    "attention gate": Row({part: {"router_type": "attention"} for part in ("vision", "connector")}),
}


def pooled_loss(body: Any, logits: dict[str, list[Tensor]], attention_mask: Tensor) -> Tensor:
    """Transformers' balance of each part's layers together, weighted as ours is."""
    pooled: Any = load_balancing_loss_func
    total = attention_mask.new_zeros((), dtype=torch.float32)
    for part, given in logits.items():
        moe = body.config.moe(part)
        mask = attention_mask if part == "text" else None
        found = pooled(tuple(given), moe.num_experts, moe.num_experts_per_tok, mask)
        total = total + BALANCE / moe.num_experts_per_tok * found
    return total


@contextmanager
def pooled_balance() -> Iterator[None]:
    """Within it every Trainer adds transformers' balance to its loss."""
    trainer_class: Any = Trainer
    own_loss = trainer_class.compute_loss

    def compute_loss(self: Any, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        body, handles = find_body(model), []
        logits: dict[str, list[Tensor]] = {part: [] for part in PARTS}

        def keep(part: str) -> Any:
            return lambda router, args, output: logits[part].append(output[0])

        for part in PARTS:
            for _, block in blocks_of(body, [part]):
                routers = [module for module in block.modules() if isinstance(module, Router)]
                handles += [router.register_forward_hook(keep(part)) for router in routers]
        try:
            loss = own_loss(self, model, inputs, *args, **kwargs)
        finally:
            for handle in handles:
                handle.remove()
        return loss + pooled_loss(
            body, {part: made for part, made in logits.items() if made}, inputs["attention_mask"]
        )

    trainer_class.compute_loss = compute_loss
    try:
        yield
    finally:
        trainer_class.compute_loss = own_loss


@contextmanager
def as_it_is() -> Iterator[None]:
    yield


@torch.no_grad()
def judge_answers(model: Any, processor: Any, rows: Any) -> dict[str, float]:
    """What a model makes of held-out questions: NLL per answer token, and exact matches."""
    collator, total, num_tokens = ChatCollator(processor), 0.0, 0
    model.eval()
    for start in range(0, len(rows), EVAL_BATCH):
        batch = collator([dict(rows[index]) for index in range(start, min(start + EVAL_BATCH, len(rows)))])
        targets = int((batch["labels"][:, 1:] != -100).sum())
        total, num_tokens = total + model(**batch).loss.item() * targets, num_tokens + targets
    answers = evaluate_vqa(model, processor, rows, batch_size=EVAL_BATCH, max_new_tokens=MAX_ANSWER_TOKENS)
    return {"nll": total / num_tokens, "accuracy": answers["accuracy"]}


def judge(model: Any, processor: Any, rows: Any) -> dict[str, float]:
    """What a sparse model makes of held-out questions, and its experts' load over them."""
    with RouterLoad(model) as load:
        answers = judge_answers(model, processor, rows)
    shares = [count.sum(0).double() / count.sum() * count.shape[1] for count in load.counts.values()]
    return answers | {
        "dead": mean((share < DEAD_BELOW).double().mean().item() for share in shares),
        "imbalance": mean(share.max().item() for share in shares),
    }


def prepare(root: Path, settings: DemoSettings) -> None:
    """A seed's parents and questions, where they are not there yet."""
    for folder, make in ((TEXT_PARENT, make_text), (VISION_PARENT, make_vision)):
        if not (root / folder / "config.json").is_file():
            make(root, settings)
    if not (root / DATA / "test.jsonl").is_file():
        write_dataset(root / DATA, settings)


def run_row(name: str, root: Path, settings: DemoSettings) -> dict[str, float]:
    """Upcycles, trains and judges one row."""
    row = ROWS[name]
    start = upcycle_parents(root, f"{name}/start", settings, force=True, **row.options(settings))
    with pooled_balance() if row.is_pooled else as_it_is():
        aligned = align(root, settings, name, start)
        tuned = tune(root, settings, name, aligned, settings.tune_steps)
    model, processor = load_model(tuned / "merged")
    return judge(model, processor, load_chat_data(root / DATA / "test.jsonl"))


def spread(values: list[float]) -> str:
    """Mean and standard deviation."""
    return f"{round(mean(values), 3) + 0.0:.3f} ± {stdev(values) if len(values) > 1 else 0.0:.3f}"


def results(root: Path, name: str) -> dict[str, dict[str, float]]:
    """What a row came to, by seed."""
    return {path.parts[-3]: json.loads(path.read_text()) for path in sorted(root.glob(f"seed-*/{name}/{RESULT}"))}


def show(root: Path) -> None:
    """Prints what there is: means over seeds, their standard deviation, and the same of what the answers' NLL is above
    the plain row of each seed.
    """
    columns = {"nll": "answer NLL", "accuracy": "accuracy", "dead": "dead experts", "imbalance": "imbalance"}
    plain = results(root, "plain")
    print(f"| routing | seeds | {' | '.join(columns.values())} | NLL above plain |\n{'|---' * (len(columns) + 3)}|")
    for name in ROWS:
        if not (found := results(root, name)):
            continue
        cells = [spread([one[key] for one in found.values()]) for key in columns]
        above = [one["nll"] - plain[seed]["nll"] for seed, one in found.items() if seed in plain]
        print(f"| {name} | {len(found)} | {' | '.join(cells)} | {spread(above) if above else ''} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output-dir", required=True, type=Path)
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=list(ROWS))
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
                found = run_row(name, root, settings)
                result.write_text(json.dumps(found))
    show(args.output_dir)


if __name__ == "__main__":
    main()
