"""What routing, the text gate and the router losses cost of a training step, at the demo's sizes.

Run: python -m benchmarks.routing_cost

The model has the demo's widths, layers and experts, from parents that are hardly trained; a step is forward and
backward of the recipe `lora` on the demo's batch of questions on pictures. `routed` is the step as it is; `fixed` the
same step where each sparse layer is handed the choice and the weights that its router made before: no router, no gate,
no losses, the same experts on the same tokens. Steps in turn, medians, for each kind of router.

Goal: routed at most 1.1 times fixed.
"""

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.measuring import describe_machine, in_turn
from benchmarks.routing import Row, in_all, prepare
from modeling_vlmoe.finetune.arguments import parse_recipe
from modeling_vlmoe.finetune.collator import ChatCollator
from modeling_vlmoe.finetune.data import load_chat_data
from modeling_vlmoe.finetune.demo.settings import DemoSettings
from modeling_vlmoe.finetune.demo.stages import DATA, load_model, upcycle_parents
from modeling_vlmoe.finetune.router_load import find_body
from modeling_vlmoe.finetune.train import build_trainer
from modeling_vlmoe.routers import Router
from modeling_vlmoe.towers import sparse_blocks

# Parents that are as large as the demo's, and know next to nothing.
SETTINGS = DemoSettings(text_num_documents=50, text_steps=3, vision_num_images=64, vision_steps=1, num_align=8,
                        num_train=64, num_test=40, min_parent_accuracy=0.0)  # fmt: skip
RECIPE = ("activation_checkpointing=false", "gradient_accumulation_steps=1", "use_cpu=true", "lora_parts=text,vision",
          f"lora_r={SETTINGS.lora_rank}", "report_to=none")  # fmt: skip
ROWS = {
    "softmax": Row(),
    "sigmoid": Row(in_all(router_type="sigmoid")),
    "text gate": Row({part: {"router_type": "attention"} for part in ("vision", "connector")}),
}


class FixedRouter(nn.Module):
    """Gives a choice that has been made.

    Args:
        moe: the part's `MoEConfig`.
        chosen: logits (T, E), weights (T, K) and experts (T, K).
    """

    def __init__(self, moe: Any, chosen: tuple[Tensor, ...]):
        super().__init__()
        self.moe, self.chosen = moe, tuple(one.detach() for one in chosen)

    def forward(self, x_TD: Tensor, context: Any = None) -> tuple[Tensor, ...]:
        """The choice, whatever the tokens."""
        return self.chosen


def trainer_of(row: Row, root: Path, name: str) -> tuple[Any, dict[str, Tensor]]:
    """The recipe's Trainer around a model of one row, and a batch on its device."""
    start = upcycle_parents(root, f"{name}/start", SETTINGS, **row.options(SETTINGS))
    model, processor = load_model(start)
    rows = load_chat_data(root / DATA / "train.jsonl")
    given = [f"model={start}", f"data={root / DATA}", f"output_dir={root / name / 'tuned'}", *RECIPE]
    trainer = build_trainer(model, processor, rows, parse_recipe("lora", given))
    batch = ChatCollator(processor)([dict(rows[index]) for index in range(SETTINGS.tune_batch_size)])
    return trainer, batch


def step(trainer: Any, batch: dict[str, Tensor]) -> Callable[[], None]:
    """One forward and backward, as a function."""
    model = trainer.model.train()

    def work() -> None:
        trainer.compute_loss(model, dict(batch)).backward()
        model.zero_grad(set_to_none=True)

    return work


def fix_routing(trainer: Any, batch: dict[str, Tensor]) -> None:
    """Puts the choice of one pass in the place of every router, and leaves out the losses."""
    body, made = find_body(trainer.model), {}
    blocks: dict[str, Any] = dict(sparse_blocks(body))
    routers = {path: [one for one in block.modules() if isinstance(one, Router)] for path, block in blocks.items()}
    handles = [
        router.register_forward_hook(lambda module, args, output, path=path: made.update({path: (module.moe, output)}))
        for path, found in routers.items()
        for router in found
    ]
    with torch.no_grad():
        trainer.model(**batch)
    for handle in handles:
        handle.remove()
    for path, (moe, chosen) in made.items():
        blocks[path].router = FixedRouter(moe, chosen)
    body.router_context = lambda *args, **kwargs: None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=list(ROWS))
    parser.add_argument("--runs", type=int, default=15)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(f"{describe_machine()}; {SETTINGS.tune_batch_size} questions a step\n")
    print("| router | fixed, ms | routed, ms | of fixed |\n|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        prepare(root, SETTINGS)
        for name in args.rows:
            routed, batch = trainer_of(ROWS[name], root, name)
            fixed, _ = trainer_of(ROWS[name], root, f"{name} fixed")
            fix_routing(fixed, batch)
            seconds = in_turn({"routed": step(routed, batch), "fixed": step(fixed, batch)}, args.runs)
            times = [seconds[key] * 1e3 for key in ("fixed", "routed")]
            print(f"| {name} | {times[0]:.1f} | {times[1]:.1f} | {times[1] / times[0]:.2f} |", flush=True)


if __name__ == "__main__":
    main()
