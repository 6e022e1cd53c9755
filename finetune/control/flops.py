"""What a training step costs: products of matrices in the forward and the backward pass over a recipe's first batch.

Counted by torch's `FlopCounterMode` while the step runs, as it runs: a frozen weight's gradient is not counted, since
it is not computed, and neither is what gradient checkpointing computes twice.
"""

import tempfile
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count
from transformers import set_seed
from transformers.integrations import moe  # noqa: F401 (it registers the host's grouped product)

from ..arguments import FinetuneArguments
from ..checkpoints import load_base, load_base_config, load_processor
from ..train import build_trainer, load_datasets

Shape = tuple[int, ...]


def grouped_flops(left: Shape, right: Shape, *args: Any, **kwargs: Any) -> int:
    """Products of torch's `_grouped_mm`: each row meets one group's matrix, or each group sums over its own rows.

    Args:
        left: (rows, width) or (groups, rows, width).
        right: (groups, width, columns) or (width, columns).
    """
    groups = left[0] if len(left) == len(right) == 3 else 1
    return 2 * groups * left[-2] * left[-1] * right[-1]


def attention_flops(query: Shape, key: Shape, value: Shape, *args: Any, **kwargs: Any) -> int:
    """Of attention's forward pass; (batch, heads, length, width)."""
    return sdpa_flop_count(query, key, value)


def attention_backward_flops(grad: Shape, query: Shape, key: Shape, value: Shape, *args: Any, **kwargs: Any) -> int:
    """Of its backward pass."""
    return sdpa_backward_flop_count(grad, query, key, value)


def grouped_backward_flops(left: Shape, right: Shape, *args: Any, **kwargs: Any) -> int:
    """Of the host's grouped product without torch's kernel: the gradients of rows and of matrices."""
    return 2 * grouped_flops(left, right)


aten, host = torch.ops.aten, torch.ops.transformers
# Operations that torch (2.13) does not count by itself.
UNCOUNTED: dict[Any, Any] = {
    aten._grouped_mm: grouped_flops,
    host.grouped_mm_fallback: grouped_flops,
    host.grouped_mm_fallback_backward: grouped_backward_flops,
    aten._scaled_dot_product_flash_attention_for_cpu: attention_flops,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: attention_backward_flops,
}


def count_pass(model: Any, inputs: Any) -> int:
    """Floating-point operations of a forward and a backward pass, in training."""
    with FlopCounterMode(display=False, custom_mapping=UNCOUNTED) as counter:
        model.train()(**inputs).loss.backward()
    return int(counter.get_total_flops())


def step_flops(args: FinetuneArguments) -> int:
    """Floating-point operations of a recipe's first micro-batch, forward and backward.

    Args:
        args: the recipe; nothing is written into its folder.
    """
    config = load_base_config(args.model, **args.hub)
    processor = load_processor(args.model, config, **args.hub)
    train, _ = load_datasets(args)
    with tempfile.TemporaryDirectory(prefix="vlmoe-flops-") as folder:
        args.output_dir = folder
        set_seed(args.seed)
        model = load_base(args.model, args.dtype, args.experts_implementation, **args.hub)
        trainer = build_trainer(model, processor, train, args)
        inputs = next(iter(trainer.get_train_dataloader()))
        return count_pass(trainer.model, trainer._prepare_inputs(inputs))
