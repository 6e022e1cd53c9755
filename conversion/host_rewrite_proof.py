"""A host's VLM that is sparse in place beside the same with experts of another form: both are given what the written
processor makes of a picture and a text, and of a video where it reads one here.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .host_inputs import check_copied, host_inputs, open_written
from .host_proof import source_logits, written_logits
from .mapped_maths import mapped_maths
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
        self.inputs, not_made = host_inputs(open_written(folder, given, None), plan.config, given, plan.drawing.seed)
        plan.not_read = plan.not_read or not_made  # the receipt and the command say so

    def results(self, model: Any, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """The logits of a picture and text, and of a video and text."""
        with mapped_maths():
            return {f"logits of {what}": self._logits(model, what, generator) for what in self.inputs}

    def _logits(self, model: Any, what: str, generator: torch.Generator | None) -> Tensor:
        if model is self.written:
            return written_logits(model, self.inputs[what], what)
        return source_logits(model, self.inputs[what], what, self.plan.source.given, generator)
