"""One layer of experts beside the dense MLP that they were made of: full experts by each kernel, and delta experts.

Run: python -m benchmarks.experts --runs 15

`dense` is the parent's MLP, of the experts' width. The first ratio is to it, medians of runs in turn. `active`, which
the second ratio is to, is a dense MLP of as many numbers as a token's experts have together: of equal active
operations, what full experts can reach at best. `decode` is one token. `fresh` is a pass with routing that was never
seen over the same pass once more, forward and backward. Peaks are of forward and backward, above weights and their
gradients.

Goals, in float32: delta at most 1.3 times dense forward and backward from 64 tokens on, and ahead of full experts
everywhere; in bfloat16: fresh at most 1.1. `--work` counts operations instead, which grow at most linearly with
experts, beside those of the dense MLP.
"""

import argparse
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP

from benchmarks.measuring import count_operations, describe_machine, in_turn, peak_bytes
from modeling_vlmoe import MoEConfig
from modeling_vlmoe.sparse_moe import SparseMoE

# Experts and experts per token, and their width.
SETTINGS = {"8x2": (8, 2, 2816), "64x8": (64, 8, 704), "64x8 wide": (64, 8, 2816)}
USUAL = ["8x2", "64x8"]
WIDTH, RANK = 1024, 16
TOKENS = (1, 64, 1024)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
KERNELS = ("eager", "grouped_mm")
COLUMNS = ("experts", "dtype", "tokens", "way", "forward", "forward + backward", "fresh", "peak, MB")


class Routing:
    """Random choices of K of E experts.

    Args:
        num_tokens: T.
        num_experts: E.
        num_picked: K.
    """

    def __init__(self, num_tokens: int, num_experts: int, num_picked: int):
        self.shape = num_tokens, num_experts, num_picked
        self.seed = 0
        self.choice = self._draw()

    def _draw(self) -> tuple[Tensor, Tensor]:
        num_tokens, num_experts, num_picked = self.shape
        generator = torch.Generator().manual_seed(self.seed)
        skew = torch.randn(num_experts, generator=generator)  # experts are unevenly liked, as real ones
        logits = torch.randn(num_tokens, num_experts, generator=generator) + skew
        weight, expert = logits.softmax(-1).topk(num_picked)
        return expert, weight.requires_grad_()

    def again(self) -> tuple[Tensor, Tensor]:
        """The last choice: experts (T, K), weights (T, K)."""
        return self.choice

    def new(self) -> tuple[Tensor, Tensor]:
        """Another choice."""
        self.seed += 1
        self.choice = self._draw()
        return self.choice


def build(kind: str, setting: str, dtype: torch.dtype, rank: int = RANK) -> nn.Module:
    """One layer's MLP or experts, with gradients in place."""
    num_experts, num_picked, middle = SETTINGS[setting]
    torch.manual_seed(0)

    def mlp(width: int) -> LlamaMLP:
        return LlamaMLP(LlamaConfig(hidden_size=WIDTH, intermediate_size=width)).to(dtype)

    if kind in ("dense", "active"):
        made: Any = mlp(middle * (num_picked if kind == "active" else 1))
    else:
        delta: dict[str, Any] = {"expert_type": "delta", "expert_rank": rank} if kind == "delta" else {}
        moe = MoEConfig(num_experts=num_experts, num_experts_per_tok=num_picked, **delta)
        config = LlamaConfig(hidden_size=WIDTH)
        config._experts_implementation_internal = "eager" if kind == "delta" else kind
        made = SparseMoE(config, moe, mlp(middle), num_layers=1).experts
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_(std=0.02)
            parameter.grad = torch.zeros_like(parameter)
    return made


def run(module: nn.Module, x: Tensor, route: Callable[[], tuple], backward: bool = True) -> Callable[[], None]:
    """One pass, as a function."""
    gradient = torch.ones_like(x)

    def work() -> None:
        with torch.set_grad_enabled(backward):
            out = module(x) if isinstance(module, LlamaMLP) else module(x, *route())
            if backward:
                out.backward(gradient)

    return work


def measure(setting: str, dtype_name: str, num_tokens: int, kinds: list[str], runs: int, rank: int) -> None:
    """Prints the rows of one cell."""
    num_experts, num_picked, _ = SETTINGS[setting]
    dtype = DTYPES[dtype_name]
    modules = {kind: build(kind, setting, dtype, rank) for kind in kinds}
    routings = {kind: Routing(num_tokens, num_experts, num_picked) for kind in kinds}
    x = torch.randn(num_tokens, WIDTH).to(dtype).requires_grad_()
    works = {kind: run(one, x, routings[kind].again) for kind, one in modules.items()}
    forward = in_turn({kind: run(one, x, routings[kind].again, False) for kind, one in modules.items()}, runs)
    both = in_turn(works, runs)
    peaks = {kind: peak_bytes(work) / 1e6 for kind, work in works.items()}
    sparse = [kind for kind in kinds if kind not in ("dense", "active")]
    turns = {f"{kind} new": run(modules[kind], x, routings[kind].new) for kind in sparse}
    new = in_turn(turns | {f"{kind} again": works[kind] for kind in sparse}, runs)
    for kind in kinds:
        fresh = f"{new[f'{kind} new'] / new[f'{kind} again']:.2f}" if kind in sparse else "-"
        cells = [setting, dtype_name, "decode" if num_tokens == 1 else num_tokens, kind]
        for times in (forward, both):
            ratios = [f"{times[kind] / times[other]:.2f}" for other in ("dense", "active") if other in times]
            cells.append(", ".join([f"{times[kind] * 1e3:.1f} ms", *ratios]))
        print(f"| {' | '.join(map(str, [*cells, fresh, f'{peaks[kind]:.0f}']))} |", flush=True)


def count_work(kind: str, num_experts: int, num_picked: int, num_tokens: int = 64) -> float:
    """Floating-point operations of a pass forward and backward, in thousands of millions."""
    SETTINGS["counted"] = (num_experts, num_picked, 704)
    x = torch.randn(num_tokens, WIDTH, requires_grad=True)
    work = run(build(kind, "counted", torch.float32), x, Routing(num_tokens, num_experts, num_picked).again)
    return count_operations(work) / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--settings", nargs="+", default=USUAL, choices=list(SETTINGS))
    parser.add_argument("--dtypes", nargs="+", default=list(DTYPES), choices=list(DTYPES))
    parser.add_argument("--tokens", nargs="+", type=int, default=list(TOKENS))
    parser.add_argument("--kinds", nargs="+", default=["active", *KERNELS, "delta"])
    parser.add_argument("--runs", type=int, default=15)
    parser.add_argument("--rank", type=int, default=RANK, help="of delta experts")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--work", action="store_true", help="count operations of delta experts, 2 to 64 of them")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.work:
        print(f"dense: {count_work('dense', 1, 1):.2f} GFLOP", flush=True)
        for num_experts, num_picked in [(number, 2) for number in (2, 4, 8, 16, 32, 64)] + [(64, 8)]:
            work = count_work("delta", num_experts, num_picked)
            print(f"{num_experts} experts, top-{num_picked}: {work:.2f} GFLOP", flush=True)
        return
    print(f"{describe_machine()}\n\n| {' | '.join(COLUMNS)} |\n{'|---' * len(COLUMNS)}|", flush=True)
    for setting in args.settings:
        for dtype_name in args.dtypes:
            for num_tokens in args.tokens:
                measure(setting, dtype_name, num_tokens, ["dense", *args.kinds], args.runs, args.rank)


if __name__ == "__main__":
    main()
