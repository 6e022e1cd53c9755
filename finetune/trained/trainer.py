"""transformers' Trainer, whose optimizer has groups by part where a recipe asks for them.

All else is the host's: which optimizer, what decays, resuming, checkpoints, wrappers. Under DeepSpeed the optimizer
has to be the Trainer's too, not one of DeepSpeed's configuration.
"""

from typing import Any

import torch
from torch import nn
from transformers import Trainer
from transformers.trainer_pt_utils import LayerWiseDummyOptimizer

from .adapted_names import bare_name, cells_by_path
from .early import trained_cells
from .groups import PART, check_groups, has_groups, split_groups
from .schedules import grouped_schedule

LEARNING_RATE = "learning_rate"


class PartsTrainer(Trainer):
    """A Trainer with learning rates, weight decays and warm-ups of parts.

    Args:
        cells: those of the bare model's parameters (`parameter_cells`).
        **kwargs: transformers' Trainer's; `args` a recipe.

    Raises:
        ValueError: if the recipe has settings for a part that is not trained, or for an optimizer without groups.
    """

    def __init__(self, cells: dict[str, str], **kwargs: Any):
        super().__init__(**kwargs)
        self.has_groups = has_groups(self.args)  # type: ignore[arg-type]
        self.paths = cells_by_path(cells)
        self.part_rates: dict[str, float] = {}
        if self.has_groups:
            check_groups(trained_cells(self.model, self.paths), self.args)  # type: ignore[arg-type]
            self._check_deepspeed()

    def _check_deepspeed(self) -> None:
        """Refuses an optimizer or a schedule that DeepSpeed makes, which would not know of parts."""
        config = getattr(self.args.hf_deepspeed_config, "config", {}) if self.is_deepspeed_enabled else {}
        if made := [name for name in ("optimizer", "scheduler") if name in config]:
            raise ValueError(
                f"The recipe has rates of parts, but the DeepSpeed configuration makes its own {made[0]}. Leave "
                f"{' and '.join(made)} out of it, for the Trainer to make."
            )

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """As the host makes it, its groups split by part."""
        is_new = self.optimizer is None
        optimizer = super().create_optimizer(model)
        if not (is_new and self.has_groups):
            return optimizer
        if isinstance(optimizer, LayerWiseDummyOptimizer):
            raise ValueError(
                f"optim is {self.args.optim}, which has an optimizer per layer and no groups. Choose another, or "
                "leave learning_rates, weight_decays and warmups out."
            )
        trained: Any = self.model if model is None else model
        decaying = set(self.get_decay_parameter_names(trained))
        cells, decays = {}, set()
        for name, parameter in trained.named_parameters():
            if (cell := self.paths.get(bare_name(name))) is None:
                raise ValueError(
                    f"Parts cannot have rates of their own here: {name} is a tensor of several of them, as FSDP's "
                    "first version makes. Use FSDP2 (fsdp_version 2), or leave learning_rates and the like out."
                )
            cells[id(parameter)] = cell
            if name in decaying:
                decays.add(id(parameter))
        split_groups(optimizer, cells, decays, self.args)  # type: ignore[arg-type]
        return optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> Any:
        """As the host makes it, with the parts' warm-ups."""
        args: Any = self.args
        if self.lr_scheduler is None and self.has_groups and args.warmups:
            self.lr_scheduler = grouped_schedule(optimizer or self.optimizer, args, num_training_steps)  # type: ignore[arg-type]
            self._created_lr_scheduler = True
        return super().create_scheduler(num_training_steps, optimizer)

    def _get_learning_rate(self) -> float:
        if self.has_groups and self.optimizer is not None:  # before the step that it is asked for
            self.part_rates = {group[PART]: float(group["lr"]) for group in self.optimizer.param_groups}
        return super()._get_learning_rate()

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """As the host does, with each part's learning rate beside the one."""
        if LEARNING_RATE in logs:
            logs |= {f"{LEARNING_RATE}/{part}": rate for part, rate in self.part_rates.items()}
        super().log(logs, *args, **kwargs)
