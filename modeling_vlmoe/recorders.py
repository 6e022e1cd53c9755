"""The host's output recorder (hidden states, router logits), made to survive pickling and `torch.compile`.

The host (transformers 5.23) records layer outputs by forward hooks. It learns of a class in `__init__`, which derived
and unpickled models did not run; it installs the hooks at the first call that records something, which `torch.compile`
cannot trace; the hooks are closures, which do not pickle; and installing them on a composite doubles those of towers
that have some already.
"""

import inspect

from torch import nn
from transformers import PreTrainedModel
from transformers.utils import output_capturing


class RecordingHook:
    """One of the host's recording hooks, made by the host's own function, in a form that pickles.

    Args:
        key: the output that is recorded.
        index: which item of the module's output tuple.
        capture_initial_hidden_state: whether the first module's input is recorded too.
    """

    def __init__(self, key: str, index: int, capture_initial_hidden_state: bool):
        self.arguments = (key, index, capture_initial_hidden_state)
        holder = nn.Module()
        output_capturing.install_output_capuring_hook(holder, *self.arguments)
        self.hook = next(iter(holder._forward_hooks.values()))

    def __call__(self, module: nn.Module, args: tuple, output: object) -> None:
        self.hook(module, args, output)

    def __reduce__(self) -> tuple:
        return RecordingHook, self.arguments


def _is_closure(hook: object) -> bool:
    return inspect.isfunction(hook) and hook.__module__ == output_capturing.__name__


def make_recorders_picklable(model: nn.Module) -> None:
    """Puts a `RecordingHook` in the place of each of the host's closures."""
    for module in model.modules():
        for number, hook in module._forward_hooks.items():
            if _is_closure(hook):
                told = inspect.getclosurevars(hook).nonlocals
                module._forward_hooks[number] = RecordingHook(
                    told["key"], told["index"], told.get("capture_initial_hidden_state", True)
                )


def register_recorders(model: nn.Module) -> None:
    """Tells the host's recorder about every class below, as `__init__` does."""
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            output_capturing._CAN_RECORD_REGISTRY[module] = module._can_record_outputs


def forget_recorders(model: nn.Module) -> None:
    """Takes the recording hooks out, so that the next installation finds every module."""
    for module in model.modules():
        for number, hook in list(module._forward_hooks.items()):
            if _is_closure(hook) or isinstance(hook, RecordingHook):
                del module._forward_hooks[number]
        module.__dict__.pop("_output_capturing_hooks_installed", None)


def install_recorders(model: PreTrainedModel) -> None:
    """Installs the recording hooks of the model and of all models below it, once each."""
    forget_recorders(model)
    register_recorders(model)
    output_capturing.maybe_install_capturing_hooks(model)
    make_recorders_picklable(model)
