"""Running a tiny VLM, dense and sparse, on text and on an image in a text: are its logits the same, and do its experts
make them?

A gap could not tell experts that are bypassed from experts that are right. So those of each sparse MLP are taken away,
one after the other: the logits have to move.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..gaps import Findings, Gap, measure_gap
from ..host_proof import host_logits
from .findings import NUM_TOKENS, first_tokens
from .vlm_inputs import image_and_text, image_form, words

LEAST_EFFECT = 1e-2  # of an MLP's experts on the logits, in standard deviations; rounding moves them by 1e-4 at most


@dataclass(frozen=True)
class Run:
    """What a dense VLM was given, and made of it.

    Attributes:
        what: the logits by name, for messages.
        inputs: `input_ids`, (batch, sequence), and an image's tensors.
        logits: (batch, sequence, vocabulary).
        form: how it takes an image; empty without one.
    """

    what: str
    inputs: dict[str, Tensor]
    logits: Tensor
    form: str = ""


@torch.no_grad()
def run_text(dense: Any) -> Run:
    """Runs a dense VLM on text."""
    inputs = words(dense, first_tokens((2, NUM_TOKENS)))
    return Run("logits of text", inputs, host_logits(dense, inputs))


@torch.no_grad()
def run_image(family: str, dense: Any) -> Run:
    """Runs a dense VLM on an image and text.

    Raises:
        ValueError: when it takes images in no known form, or its logits do not depend on the image.
    """
    form = image_form(family, type(dense))
    inputs = image_and_text(dense, form)
    found = Run("logits of an image and text", inputs, host_logits(dense, inputs), form.name)
    other = {name: -value if value.is_floating_point() else value for name, value in inputs.items()}
    if not measure_gap(found.logits, host_logits(dense, other)) >= LEAST_EFFECT:
        raise ValueError(f"its logits do not depend on an image given as {form.name}. Give it in another form.")
    return found


@torch.no_grad()
def judge_logits(findings: Findings, run: Run, dense: Any, sparse: Any) -> Gap:
    """Judges a sparse VLM's logits as the proof of a conversion judges them.

    Args:
        findings: takes the gap.
        run: of the dense VLM.
        dense: the dense VLM.
        sparse: the sparse one.

    Returns:
        The gap.

    Raises:
        ProofError: when it is too large.
    """
    nudged = partial(host_logits, dense, run.inputs, torch.Generator().manual_seed(7))
    findings.judge(run.what, run.logits, host_logits(sparse, run.inputs), nudged)
    return findings.judged[run.what]


@torch.no_grad()
def check_effects(run: Run, sparse: Any, paths: Iterable[str]) -> None:
    """Takes the experts of each MLP away, and puts them back.

    Args:
        run: of the dense VLM.
        sparse: the sparse one.
        paths: its sparse MLPs.

    Raises:
        ValueError: naming the MLPs whose experts do nothing.
    """
    idle = []
    for path in paths:
        parameters = list(sparse.get_submodule(path).experts.parameters())
        kept = [parameter.clone() for parameter in parameters]
        for parameter in parameters:
            parameter.zero_()
        if not measure_gap(run.logits, host_logits(sparse, run.inputs)) >= LEAST_EFFECT:
            idle.append(path)
        for parameter, values in zip(parameters, kept, strict=True):
            parameter.copy_(values)
    if idle:
        raise ValueError(
            f"The {run.what} do not depend on the experts of {', '.join(idle)}: they are bypassed. Leave them dense."
        )
