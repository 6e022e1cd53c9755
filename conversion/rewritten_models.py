"""A checkpoint and the same with experts of another form, run beside one another.

All maths in float32 on weights mapped from the files. Densified experts are proved: each block, past its router too,
and the results are what the delta experts compute with their weights summed, and rounded where the written dtype
rounds. Compressed ones are measured: how far each expert's weights are from what they were, and the results.
"""

from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from modeling_vlmoe.towers import sparse_blocks

from .assignments import DELTAS, EXPERTS
from .block_probes import BlockProbe
from .dense_tensors import map_sparse
from .gaps import Findings, measure_gap
from .lossy_routing import let_tokens_choose
from .probes import all_of
from .rewrite_plan import CLAIM, RewritePlan
from .seeding import tensor_generator
from .streaming import CheckpointReader
from .summed_experts import SummedExperts
from .written_checkpoint import check_weights, open_model

TINY = torch.finfo(torch.float32).tiny


class Rewriting:
    """Both models, and what they make of the same inputs.

    Args:
        plan: What was to be written.
        folder: What was written.

    Raises:
        ProofError: when the files do not hold what they were to hold.
    """

    def __init__(self, plan: RewritePlan, folder: Path):
        self.plan, self.folder = plan, folder
        self.reader = CheckpointReader(folder)
        check_weights(plan.mapping, plan.drawing, self.reader, set())
        self.source = map_sparse(plan.tensors)
        self.written: Any = open_model(plan, folder, self.reader, set())  # type: ignore[arg-type]
        self.findings = Findings(claim=CLAIM)

    def _generator(self, name: str) -> torch.Generator:
        return tensor_generator(self.plan.drawing.seed, f"proof of {name}")

    def results(self, model: Any, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """What one of the two makes of the inputs, by what it is; moved by their last bit where a generator is
        given.
        """
        raise NotImplementedError

    def _take_rounded(self) -> None:
        """Has the checkpoint's model read what was copied into another dtype as it was written (its bits are checked):
        a cast is the user's wish.
        """
        copied = [one for one in self.plan.mapping.assignments if one.operation == "copy"]
        cast = {one.dense[0].name: one.spec.name for one in copied if one.dense[0].dtype != one.spec.dtype}

        def read(name: str) -> Tensor:
            return self.reader.tensor(cast[name]) if name in cast else self.plan.tensors.tensor(name)

        if cast:
            self.source = map_sparse(self.plan.tensors, read)

    def _let_tokens_choose(self) -> None:
        """Where experts choose tokens, rows that a probe adds would change what they choose; it is the experts that
        are to be proved.
        """
        for model in (self.source, self.written):
            for _, block in sparse_blocks(model):
                let_tokens_choose(block)

    def _probe(self, path: str, dtype: torch.dtype) -> BlockProbe:
        """One for a block, whose delta experts are summed from here on, and rounded to a dtype."""
        block = self.source.get_submodule(path)
        block.experts = SummedExperts(block.experts, dtype)
        made, run = self.written.get_submodule(path), partial(block.__class__.__call__, block)
        return BlockProbe(path, block, run, made, None, self.plan.drawing.seed, self.findings)  # type: ignore[arg-type]

    def prove(self) -> Findings:
        """Judges whether both compute the same.

        Raises:
            ProofError: naming what differs.
        """
        self._let_tokens_choose()
        unrounded = self.results(self.source)
        self._take_rounded()
        self._let_tokens_choose()
        dtypes = {one.spec.name: one.spec.dtype for one in self.plan.mapping.assignments}
        probes = [self._probe(path, dtypes[f"{path}{EXPERTS}down_proj"]) for path in self.plan.rewritten]
        with all_of([probe.noting() for probe in probes]):
            wanted = self.results(self.source)
        with all_of([probe.comparing() for probe in probes]):
            got = self.results(self.written)
        nudged = cache(lambda: self.results(self.source, self._generator("nudge")))
        for what, result in wanted.items():
            self.findings.judge(what, result, got[what], lambda what=what: nudged()[what])  # type: ignore[misc]
            self.findings.informative[f"{what}, from those by unrounded weights"] = measure_gap(
                unrounded[what], got[what]
            )
        return self.findings

    def measure(self) -> tuple[Findings, dict[str, dict[str, float]]]:
        """How far the written model is from the checkpoint: results in standard deviations; by stack, the relative
        error of the experts' weights (Frobenius norm), its mean and its largest.
        """
        wanted, got = self.results(self.source), self.results(self.written)
        for what, result in wanted.items():
            self.findings.informative[what] = measure_gap(result, got[what])
        return self.findings, {path: error for path in self.plan.rewritten for path, error in self._errors(path)}

    def compare(self, is_exact: bool, claim: str) -> Findings:
        """Judges whether both compute the same, or measures how far apart they are, in standard deviations.

        Args:
            is_exact: Whether they are to.
            claim: What a gap that is too large means.

        Raises:
            ProofError: naming what differs.
        """
        self.findings.claim = claim
        wanted, got = self.results(self.source), self.results(self.written)
        nudged = cache(lambda: self.results(self.source, self._generator("nudge")))
        for what, result in wanted.items():
            if is_exact:
                self.findings.judge(what, result, got[what], lambda what=what: nudged()[what])  # type: ignore[misc]
            else:
                self.findings.informative[what] = measure_gap(result, got[what])
        return self.findings

    def _errors(self, path: str) -> list[tuple[str, dict[str, float]]]:
        found = []
        for name in self.source.get_submodule(path).experts.stacks:
            stack = self.plan.tensors.tensor(f"{path}{EXPERTS}{name}")
            base = self.reader.tensor(f"{path}{EXPERTS}{name}").float()
            a, b = (self.reader.tensor(f"{path}{EXPERTS}{DELTAS}{name}_{pair}").float() for pair in "ab")
            apart = [
                (expert.float() - base - one_b @ one_a).norm()
                for expert, one_a, one_b in zip(stack, a, b, strict=True)
            ]
            norms = torch.stack([expert.float().norm() for expert in stack])
            # An expert of zeros is measured by the others.
            scales = torch.where(norms > 0, norms, norms.square().mean().sqrt()).clamp(min=TINY)
            errors = torch.stack(apart) / scales
            found.append((f"{path}{EXPERTS}{name}", {"mean": errors.mean().item(), "max": errors.max().item()}))
        return found
