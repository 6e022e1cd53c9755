"""Running a part dense and sparse, side by side: what the proofs of all kinds of models have in common."""

from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from modeling_vlmoe.mlp_layouts import run_dense

from .block_probes import BlockProbe
from .casts import find_casts
from .dense_runs import DenseRun, parent_of
from .gaps import LIMIT, Findings, ProofError, measure_gap
from .lossy_routing import WeightSums, make_exact
from .mapped_maths import mapped_maths
from .parents import BROKEN
from .plans import UpcyclePlan
from .probes import GIVEN, Probe, all_of
from .seeding import tensor_generator
from .streaming import CheckpointReader
from .written_checkpoint import check_weights, expert_pages, open_model


class PartProof:
    """One proof of one written folder: whatever is run, dense and sparse, is compared with probes in its MLPs.

    Args:
        plan: What was to be written.
        folder: What was written.
        reads_all: As of `prove`.

    Raises:
        ProofError: when the files do not hold what they were to hold.
    """

    def __init__(self, plan: UpcyclePlan, folder: Path, reads_all: bool):
        self.plan, self.folder = plan, folder
        reader = CheckpointReader(folder)
        repeated = set() if reads_all else plan.mapping.repeated(plan.drawing)
        check_weights(plan.mapping, plan.drawing, reader, repeated)
        self.sparse: Any = open_model(plan, folder, reader, repeated)
        self.pages = expert_pages(plan, reader, self.sparse)
        self.real: Any = None  # with the routing that was asked for, where that is lossy
        if plan.is_lossy:
            self.real = open_model(plan, folder, reader, repeated)
            make_exact(self.sparse)
        self.findings = Findings(claim=plan.claim)
        self.rounded = {cast.parent for cast in find_casts(plan) if not cast.is_exact}

    def _generator(self, name: str) -> torch.Generator:
        return tensor_generator(self.plan.drawing.seed, f"proof of {name}")

    def _probes(self, roots: dict[str, nn.Module]) -> list[Probe]:
        """One probe for each sparse MLP below these modules, which are named by what their paths begin with."""
        probes = []
        for prefix, root in roots.items():
            for path, mlp in self.plan.mlps.items():
                if path.startswith(prefix):
                    inner = path.removeprefix(prefix)
                    dense = root.get_submodule(inner)
                    run = partial(run_dense, root.get_submodule(mlp.layout.source_path(inner)), mlp.layout)
                    sparse: Any = self.sparse.get_submodule(path)
                    seed = self.plan.drawing.seed
                    kind = BlockProbe if hasattr(dense, "experts") else Probe  # the parent is sparse itself
                    probes.append(kind(path, dense, run, sparse, self.plan.dtype, seed, self.findings))
        return probes

    def compare(
        self,
        part: str,
        make_dense: Callable[[torch.dtype | None], DenseRun],
        run_sparse: Callable[[], dict[str, Tensor]],
    ) -> None:
        """Runs a part dense and sparse, with probes in its MLPs, and judges the results.

        Args:
            part: `text`, `vision` or `vlm`: whose parent it is.
            make_dense: Gives the dense run for the dtype that weights are rounded to.
            run_sparse: Gives the sparse results under the same names.
        """
        dense = make_dense(self.plan.dtype)
        probes = self._probes(dense.roots)
        try:
            with all_of([probe.noting() for probe in probes]):
                wanted = dense()
        except ProofError:
            raise
        except BROKEN as error:
            given = self.plan.parents[parent_of(self.plan, part)].given
            beside = " with its own processor," if part == "vlm" else ""
            raise ValueError(
                f"{given} cannot be run, as it is,{beside} on {part}: {error}. Mend or replace what does not belong "
                "to it: its config.json, its processor or its weights."
            ) from error
        if broken := [what for what, result in wanted.items() if result.isnan().any()]:
            given = self.plan.parents[parent_of(self.plan, part)].given
            raise ValueError(f"{given} gives no numbers (NaN) as {broken[0]}: its weights are broken. Replace them.")
        try:
            with mapped_maths(), all_of([probe.comparing() for probe in probes]):
                got = run_sparse()
        except ProofError:
            raise
        except BROKEN as error:  # whatever the host's code stumbles over
            raise ProofError(
                f"What was written cannot be run on {part}: {error}. No checkpoint is written."
            ) from error
        nudged_results = cache(lambda: dense(self._generator(f"{part} nudge")))
        astray = self._first_astray(probes)
        for what, dense_result in wanted.items():
            nudged = partial(lambda what: nudged_results()[what], what)
            self.findings.judge(what, dense_result, got[what], nudged, astray)
        if parent_of(self.plan, part) in self.rounded:
            for what, stored in make_dense(None)().items():
                gap = measure_gap(stored, got[what])
                self.findings.informative[f"{what}, against the parent as it is stored"] = gap
        if self.real is not None:
            self._measure_routing(wanted, run_sparse)

    def _measure_routing(self, wanted: dict[str, Tensor], run_sparse: Callable[[], dict[str, Tensor]]) -> None:
        """Measures the scales of raw weights, and how far the routing that was asked for is from the dense results."""
        sums = WeightSums(self.sparse, self.real)
        exact = self.sparse
        with mapped_maths():
            with sums.noting():
                run_sparse()
            self.findings.scales |= sums.apply()
            try:
                self.sparse = self.real
                got = run_sparse()
            finally:
                self.sparse = exact
        for what, dense_result in wanted.items():
            self.findings.lossy[what] = measure_gap(dense_result, got[what])

    def _first_astray(self, probes: list[Probe]) -> str:
        """The first MLP that is given something else than its dense one, for messages."""
        given = ((probe.path, self.findings.informative[f"{probe.path}, {GIVEN}"]) for probe in probes)
        first = next((path for path, gap in given if gap > LIMIT), None)
        return "" if first is None else f" (first astray: what {first} is given)"

    def run(self) -> None:
        """Proves what the kind of model calls for.

        Raises:
            ProofError: naming what differs.
        """
        raise NotImplementedError
