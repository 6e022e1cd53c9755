"""A host's VLM that is sparse in place beside the same with experts of another form: both are given what the written
processor makes of a picture and a text, and of a video where it reads one here.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .gaps import ProofError
from .host_inputs import Inputs, check_copied, host_inputs, open_written
from .host_proof import host_logits
from .mapped_maths import mapped_maths
from .parents import BROKEN
from .rewrite_plan import HostRewritePlan
from .rewritten_models import Rewriting


class HostRewriting(Rewriting):
    """Both models, and their logits.

    Args:
        plan: What was to be written.
        folder: What was written.

    Raises:
        ProofError: when the files do not hold what they were to hold, the processor's too.
    """

    plan: HostRewritePlan

    def __init__(self, plan: HostRewritePlan, folder: Path):
        super().__init__(plan, folder)
        given = plan.source.given
        check_copied(plan.source.folder, folder)
        self.inputs, not_made = host_inputs(open_written(folder, given, None), given, plan.drawing.seed)
        plan.not_read = plan.not_read or not_made  # the receipt and the command say so

    def results(self, model: Any, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """The logits of a picture and text, and of a video and text."""
        with mapped_maths():
            return {f"logits of {what}": self._logits(model, what, generator) for what in self.inputs}

    def _logits(self, model: Any, what: str, generator: torch.Generator | None) -> Tensor:
        inputs: Inputs = self.inputs[what]
        try:
            return host_logits(model, inputs, generator)
        except ProofError:  # of a probe inside
            raise
        except BROKEN as error:  # whatever the host's code stumbles over
            if model is self.written:
                raise ProofError(
                    f"What was written cannot be run on {what}: {error}. No checkpoint is written."
                ) from error
            raise ValueError(
                f"{self.plan.source.given} cannot be run, as it is, on what its processor makes of {what}: {error}. "
                "Mend or replace it."
            ) from error
