"""How the experts are made of the dense MLP (MATHS section 2).

An init is given one dense tensor and where it goes, and returns the expert's tensor, of the same shape. It is called
once for each expert and dense tensor, in the order of the file, so it must not depend on earlier calls.
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class ExpertSlot:
    """Where a dense tensor goes.

    Attributes:
        mlp: Name of the sparse MLP in the model, `model.language_model.layers.0.mlp`.
        dense_name: Name of the dense tensor inside the MLP, `up_proj.weight`.
        expert: Which expert, from 0.
        seed: The run's seed.
    """

    mlp: str
    dense_name: str
    expert: int
    seed: int


ExpertInit = Callable[[Tensor, ExpertSlot], Tensor]


def copy(dense: Tensor, slot: ExpertSlot) -> Tensor:
    """Each expert is the dense MLP, biases too. Exact for any router while the weights of the chosen sum to one."""
    return dense


# Of delta experts the base is the dense MLP, and so are the biases, which each expert has of its own.
DELTA = "delta"
EXPERT_INITS: dict[str, ExpertInit] = {"copy": copy, DELTA: copy}
