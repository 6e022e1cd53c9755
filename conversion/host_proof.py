"""The proof of a VLM that stays in its own class: dense and sparse, it is given the same processed pictures and text,
and where its processor reads videos here, a video.
"""

import inspect
from typing import Any

import torch
from torch import Tensor
from transformers.utils import PROCESSOR_NAME

from modeling_vlmoe.parts import word_embedding

from .dense_runs import DenseRun, reference_model
from .gaps import ProofError, nudge
from .host_inputs import PICTURE, Inputs, host_inputs, open_written, pictures
from .host_planning import InPlacePlan
from .host_processor_classes import is_same_tokenizer
from .host_processors import process
from .parents import BROKEN
from .part_proofs import PartProof
from .probes import hooked

VLM = "vlm"


def accepted(model: Any, inputs: dict[str, Any]) -> dict[str, Any]:
    """Of what a processor gives, what a model's forward takes, everything where it takes any keyword; but no labels,
    which PaliGemma's gives.
    """
    parameters = inspect.signature(model.forward).parameters
    takes_any = any(one.kind is one.VAR_KEYWORD for one in parameters.values())
    return {name: value for name, value in inputs.items() if name != "labels" and (takes_any or name in parameters)}


def nudged(inputs: dict[str, Any], generator: torch.Generator) -> dict[str, Any]:
    """Inputs of which every number that is none of a token is moved by its last bit."""
    return {
        name: nudge(value, generator) if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in inputs.items()
    }


def host_logits(model: Any, inputs: dict[str, Any], generator: torch.Generator | None = None) -> Tensor:
    """A VLM's logits, (batch, sequence, vocabulary).

    Args:
        model: The VLM.
        inputs: What it is given; what its forward does not take is left out.
        generator: Given, the inputs and the tokens' embeddings are moved by their last bit.
    """
    given = accepted(model, inputs) | {"use_cache": False}
    if generator is None:
        return model(**given).logits
    hook = word_embedding(model).register_forward_hook(lambda module, args, output: nudge(output, generator))
    with hooked(hook):
        return model(**nudged(given, generator)).logits


def written_logits(model: Any, inputs: dict[str, Any], what: str) -> Tensor:
    """The logits of a model that was written.

    Args:
        model: The VLM.
        inputs: What it is given.
        what: What that is, for messages.

    Raises:
        ProofError: when it cannot be run on it.
    """
    try:
        return host_logits(model, inputs)
    except ProofError:  # of a probe inside
        raise
    except BROKEN as error:  # whatever the host's code stumbles over
        raise ProofError(f"What was written cannot be run on {what}: {error}. No checkpoint is written.") from error


def source_logits(
    model: Any, inputs: dict[str, Any], what: str, given: str, generator: torch.Generator | None = None
) -> Tensor:
    """The logits of the checkpoint that another is made of.

    Args:
        model: The VLM.
        inputs: What it is given.
        what: What that is, for messages.
        given: What messages call the checkpoint.
        generator: As of `host_logits`.

    Raises:
        ValueError: when it cannot be run on it.
    """
    try:
        return host_logits(model, inputs, generator)
    except ProofError:
        raise
    except BROKEN as error:
        raise ValueError(
            f"{given} cannot be run, as it is, on what its processor makes of {what}: {error}. Mend or replace it."
        ) from error


class HostProof(PartProof):
    """The proof of a VLM that is sparse in place."""

    plan: InPlacePlan

    def inputs(self) -> dict[str, Inputs]:
        """What the written processor makes of a picture, and of a video; by what it is.

        Raises:
            ProofError: when it makes something else than the parent's does.
        """
        given, plan = self.plan.parents[VLM].given, self.plan
        written = open_written(self.folder, "What was written", None)
        if not is_same_tokenizer(written, plan.processor):
            raise ProofError(
                f"The tokenizer that was written ({type(written.tokenizer).__name__}) does not split texts as its "
                f"parent's ({type(plan.processor.tokenizer).__name__}). No checkpoint is written."
            )
        found, not_made = host_inputs(written, plan.config, given, plan.drawing.seed)
        plan.not_read = plan.not_read or not_made  # the receipt and the command say so
        for name, value in process(plan.processor, pictures(plan.processor, plan.drawing.seed), given).items():
            got = found[PICTURE].get(name)
            if isinstance(value, Tensor) and not (isinstance(got, Tensor) and torch.equal(value, got)):
                raise ProofError(
                    f"The processor that was written ({PROCESSOR_NAME} and beside it) gives another {name} for a "
                    "picture than its parent's. No checkpoint is written."
                )
        return found

    def dense_run(self, given: dict[str, Inputs], dtype: torch.dtype | None) -> DenseRun:
        """The dense VLM on these inputs: its logits."""
        model: Any = reference_model(self.plan, VLM, dtype)

        def results(generator: torch.Generator | None) -> dict[str, Tensor]:
            return {f"logits of {what}": host_logits(model, inputs, generator) for what, inputs in given.items()}

        return DenseRun({"": model}, dtype, results)

    def run(self) -> None:
        given = self.inputs()

        def results() -> dict[str, Tensor]:
            found = {f"logits of {what}": host_logits(self.sparse, inputs) for what, inputs in given.items()}
            for what, logits in found.items():
                if not logits.isfinite().all():
                    raise ProofError(f"The {what} are not finite. No checkpoint is written.")
            return found

        self.compare(VLM, lambda dtype: self.dense_run(given, dtype), results)
