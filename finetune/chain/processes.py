"""What one process does for all: the others wait, and learn what came of it."""

from collections.abc import Callable
from typing import Any, TypeVar

from accelerate import PartialState
from accelerate.utils import broadcast_object_list

Result = TypeVar("Result")


def is_main() -> bool:
    """Whether this is the process that writes."""
    return bool(PartialState().is_main_process)


def on_main(call: Callable[[], Result]) -> Result:
    """Calls on the first process alone; all get the result, or its error, so that none waits for ever.

    Raises:
        ValueError: in every process, where the first one could not do it.
    """
    if PartialState().num_processes == 1:
        return call()
    outcome: list[Any] = [None, None]
    failed: Exception | None = None
    if is_main():
        try:
            outcome[0] = call()
        except (ValueError, OSError) as error:
            outcome[1], failed = str(error), error
    broadcast_object_list(outcome, from_process=0)
    if failed is not None:
        raise failed
    if outcome[1] is not None:
        raise ValueError(outcome[1])
    return outcome[0]
