"""One layer of experts beside the dense MLP that they were made of: full experts by each kernel, and delta experts.

Run: python -m benchmarks.experts --runs 15

`dense` is the parent's MLP, of the experts' width. Ratios are to it, medians of runs in turn. `active` is a dense MLP
of as many numbers as a token's experts have together, what full experts can reach at best. `decode` is one token.
`fresh` is new routing at every call over the same routing again and again, forward and backward. Peaks are of forward
and backward, above weights and their gradients.

Goals, in float32: delta at most 1.3 times dense forward and backward from 64 tokens on, and ahead of full experts
everywhere; in bfloat16: fresh at most 1.1. `--work` counts operations instead, which grow at most linearly with
experts.
"""

import argparse
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP

from benchmarks.measuring import describe_machine, in_turn, peak_bytes
from modeling_vlmoe import MoEConfig
from modeling_vlmoe.sparse_moe import SparseMoE

# Experts and experts per token, and their width.
SETTINGS = {"8x2": (8, 2, 2816), "64x8": (64, 8, 704)}
WIDTH, RANK = 1024, 16
TOKENS = (1, 64, 1024)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
KERNELS = ("eager", "grouped_mm")
NUM_ROUTINGS = 64
COLUMNS = ("experts", "dtype", "tokens", "way", "forward", "forward + backward", "fresh", "peak, MB")


class Routing:
    """Random choices of K of E experts, each a new one or always the same.

    Args:
        num_tokens: T.
        num_experts: E.
        num_picked: K.
        is_fresh: whether every call gives another.
    """

    def __init__(self, num_tokens: int, num_experts: int, num_picked: int, is_fresh: bool):
        self.made = []
        for seed in range(NUM_ROUTINGS if is_fresh else 1):
            generator = torch.Generator().manual_seed(seed)
            skew = torch.randn(num_experts, generator=generator)  # experts are unevenly liked, as real ones
            logits = torch.randn(num_tokens, num_experts, generator=generator) + skew
            weight, expert = logits.softmax(-1).topk(num_picked)
            self.made.append((expert, weight.requires_grad_()))
        self.calls = 0

    def __call__(self) -> tuple[Tensor, Tensor]:
        self.calls += 1
        return self.made[self.calls % len(self.made)]


def build(kind: str, setting: str, dtype: torch.dtype) -> nn.Module:
    """One layer's MLP or experts, with gradients in place."""
    num_experts, num_picked, middle = SETTINGS[setting]
    torch.manual_seed(0)

    def mlp(width: int) -> LlamaMLP:
        return LlamaMLP(LlamaConfig(hidden_size=WIDTH, intermediate_size=width)).to(dtype)

    if kind in ("dense", "active"):
        made: Any = mlp(middle * (num_picked if kind == "active" else 1))
    else:
        delta: dict[str, Any] = {"expert_type": "delta", "expert_rank": RANK} if kind == "delta" else {}
        moe = MoEConfig(num_experts=num_experts, num_experts_per_tok=num_picked, **delta)
        config = LlamaConfig(hidden_size=WIDTH)
        config._experts_implementation_internal = "eager" if kind == "delta" else kind
        made = SparseMoE(config, moe, mlp(middle), num_layers=1).experts
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_(std=0.02)
            parameter.grad = torch.zeros_like(parameter)
    return made


def run(module: nn.Module, x: Tensor, routing: Routing, backward: bool) -> Callable[[], None]:
    """One pass, as a function."""
    gradient = torch.ones_like(x)

    def work() -> None:
        with torch.set_grad_enabled(backward):
            out = module(x) if isinstance(module, LlamaMLP) else module(x, *routing())
            if backward:
                out.backward(gradient)

    return work


def measure(setting: str, dtype_name: str, num_tokens: int, kinds: list[str], runs: int) -> None:
    """Prints the rows of one cell."""
    num_experts, num_picked, _ = SETTINGS[setting]
    dtype = DTYPES[dtype_name]
    modules = {kind: build(kind, setting, dtype) for kind in kinds}
    x = torch.randn(num_tokens, WIDTH).to(dtype).requires_grad_()
    fixed, fresh = (Routing(num_tokens, num_experts, num_picked, is_fresh) for is_fresh in (False, True))
    forward = in_turn({kind: run(one, x, fixed, backward=False) for kind, one in modules.items()}, runs)
    both = in_turn({kind: run(one, x, fixed, backward=True) for kind, one in modules.items()}, runs)
    sparse = {kind: one for kind, one in modules.items() if kind not in ("dense", "active")}
    passes = {(kind, is_fresh): run(one, x, way, backward=True) for kind, one in sparse.items()
              for is_fresh, way in ((False, fixed), (True, fresh))}  # fmt: skip
    again = in_turn({f"{kind} {is_fresh}": work for (kind, is_fresh), work in passes.items()}, runs)
    for kind, module in modules.items():
        ratio = f"{again[f'{kind} True'] / again[f'{kind} False']:.2f}" if kind in sparse else "-"
        peak = peak_bytes(run(module, x, fixed, backward=True)) / 1e6
        times = [f"{times[kind] * 1e3:.1f} ms, {times[kind] / times['dense']:.2f}" for times in (forward, both)]
        what = "decode" if num_tokens == 1 else num_tokens
        print(
            f"| {setting} | {dtype_name} | {what} | {kind} | {times[0]} | {times[1]} | {ratio} | {peak:.0f} |",
            flush=True,
        )


def count_work(num_experts: int, num_tokens: int = 64) -> int:
    """Floating-point operations of delta experts, forward and backward, top-2."""
    SETTINGS["counted"] = (num_experts, 2, 704)
    module = build("delta", "counted", torch.float32)
    x = torch.randn(num_tokens, WIDTH, requires_grad=True)
    work = run(module, x, Routing(num_tokens, num_experts, 2, is_fresh=False), backward=True)
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--settings", nargs="+", default=list(SETTINGS), choices=list(SETTINGS))
    parser.add_argument("--dtypes", nargs="+", default=list(DTYPES), choices=list(DTYPES))
    parser.add_argument("--tokens", nargs="+", type=int, default=list(TOKENS))
    parser.add_argument("--kinds", nargs="+", default=["active", *KERNELS, "delta"])
    parser.add_argument("--runs", type=int, default=15)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--work", action="store_true", help="count operations of delta experts, 2 to 64 of them")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.work:
        for num_experts in (2, 4, 8, 16, 32, 64):
            print(f"{num_experts} experts: {count_work(num_experts) / 1e9:.2f} GFLOP", flush=True)
        return
    print(f"{describe_machine()}\n\n| {' | '.join(COLUMNS)} |\n{'|---' * len(COLUMNS)}|", flush=True)
    for setting in args.settings:
        for dtype_name in args.dtypes:
            for num_tokens in args.tokens:
                measure(setting, dtype_name, num_tokens, ["dense", *args.kinds], args.runs)


if __name__ == "__main__":
    main()
