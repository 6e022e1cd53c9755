"""The methods that train weights themselves: `full`, what `train` names or all; `delta`, what delta experts have of
their own, with routers and connector. Both leave a full checkpoint.
"""

from typing import Any

from torch import nn

from modeling_vlmoe.delta_experts import delta_experts
from modeling_vlmoe.moe_config import PARTS

from ..settings import FinetuneSettings
from .cells import parameter_cells
from .choice import choose, frozen_for_good
from .names import ALL

NO_DELTAS = (
    "method is delta, which trains what delta experts have of their own, but the model has none: {what}. Make some: "
    "vlmoe upcycle ... --expert-init delta, or vlmoe compress MODEL --rank 16 --output-dir OUT; or choose method full."
)


def check_delta(config: Any) -> None:
    """Refuses method `delta` for a model without delta experts, from its configuration alone.

    Raises:
        ValueError: saying what makes delta experts.
    """
    moes = [moe for part in PARTS if (moe := config.moe(part)) is not None]
    if not any(moe.expert_type == "delta" for moe in moes):
        raise ValueError(NO_DELTAS.format(what="its experts are whole" if moes else "it is dense"))


def delta_names(model: Any) -> set[str]:
    """What method `delta` trains: pairs and biases of delta experts, routers, and the connector but for a base in it.

    Raises:
        ValueError: if the model has no delta experts.
    """
    check_delta(model.config)
    cells = parameter_cells(model)
    frozen = frozen_for_good(model, cells)
    bases, own = set(), set()
    for path, experts in delta_experts(model):
        bases |= {f"{path}.{name}" for name, _ in experts.named_parameters(recurse=False)}
        own |= {f"{path}.deltas.{name}" for name, _ in experts.deltas.named_parameters()}
    beside = {
        name for name, cell in cells.items() if cell.rpartition(".")[2] == "routers" or cell.startswith("connector.")
    }
    return (own | beside) - bases - frozen.keys()


def train_only(model: nn.Module, names: set[str]) -> None:
    """Freezes all parameters but those of these names."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in names)


def prepare_whole(model: Any, settings: FinetuneSettings) -> None:
    """Leaves trainable what method `full` or `delta` trains.

    Raises:
        ValueError: as `choose` and `delta_names`.
    """
    is_full = settings.method == "full"
    train_only(model, choose(model, settings.train or [ALL]) if is_full else delta_names(model))
