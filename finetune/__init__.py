"""Fine-tuning a vlmoe model: `finetune(FinetuneArguments(...))`, behind `vlmoe finetune recipe.yaml [key=value ...]`.

Names are looked up on first use, so that a command's help need not import torch.
"""

import sys
from importlib import import_module

_HOMES = {
    "AlarmLimits": "routing_alarms",
    "ChatCollator": "collator",
    "FinetuneArguments": "arguments",
    "PartsTrainer": "trained.trainer",
    "RouterLoad": "router_load",
    "RouterLoadCallback": "callbacks",
    "VQAExactMatch": "metrics",
    "build_trainer": "train",
    "count_cells": "trained.counts",
    "EvaluateSettings": "evaluate.settings",
    "evaluate_checkpoints": "evaluate.run",
    "evaluate_vqa": "evaluation",
    "finetune": "train",
    "follow_trainer": "loss_follower",
    "WholeUploads": "uploads",
    "load_chat_data": "data",
    "load_chat_stream": "data_formats.streams",
    "check_data": "data_check.check",
    "DataCheckSettings": "data_check.settings",
    "load_finetuned": "checkpoints",
    "log_router_load": "callbacks",
    "lora_config": "adapters",
    "majority_baseline": "evaluation",
    "merge_adapter": "checkpoints",
    "metric": "evaluate.offline_metrics",
    "metric_path": "evaluate.offline_metrics",
    "parse_chain": "chain.recipe",
    "parameter_cells": "trained.cells",
    "parse_recipe": "arguments",
    "prepare_model": "adapters",
    "run_chain": "chain.run",
    "run_recipe": "recipe_runs",
    "run_with_control": "control.run",
    "save_finetuned": "checkpoints",
    "set_lora_dropout": "adapters",
    "shuffled_images": "evaluation",
    "watch_training": "watch.watch",
    "write_evaluation": "evaluation_file",
}
__all__ = list(_HOMES)


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_HOMES[name]}", __name__), name)
    setattr(sys.modules[__name__], name, value)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
