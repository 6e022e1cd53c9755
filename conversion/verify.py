"""The proof: what was written computes what the parents compute. It reads the written files, and the parents' own.

Three questions, all maths in float32 on weights mapped from the files:

- Do the files hold what they were to hold? Names, shapes, dtypes, bytes.
- Is each sparse MLP its dense one? Side by side, on random rows of which every expert gets some, and on the rows that
  the dense model really gives it.
- Does the whole, as its own configuration and processor describe it, give what the parents give? Logits of random
  tokens with a picture behind them, and what ViT and connector make of the picture.

How far results may be apart is said in `gaps`. The dense side is the parent in the dtype that is written: a cast is
the user's wish, an error is not; what a cast that rounds costs is measured too, but not judged.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

from modeling_vlmoe.configuration_vlmoe import feature_layers
from modeling_vlmoe.mlp_layouts import run_dense

from .block_probes import BlockProbe
from .casts import find_casts
from .dense_runs import DenseRun, dense_images, dense_text, image_results, parent_of, reads_ahead
from .gaps import LIMIT, Findings, ProofError, measure_gap
from .mapped_maths import mapped_maths
from .mapping import PART_PREFIX
from .planning import UpcyclePlan
from .probes import GIVEN, Probe, all_of, hooked
from .seeding import tensor_generator
from .streaming import CheckpointReader
from .written_checkpoint import check_weights, expert_pages, open_model, process_pictures

NUM_TOKENS = 16
NUM_SEEN = 8  # image features that the LLM reads: its cost is not to grow with the picture's tokens

__all__ = ["LIMIT", "ProofError", "prove"]


class Proof:
    """One proof of one written folder.

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
        self.findings = Findings(claim=plan.claim)
        self.rounded = {cast.parent for cast in find_casts(plan) if not cast.is_exact}

    def _generator(self, name: str) -> torch.Generator:
        return tensor_generator(self.plan.drawing.seed, f"proof of {name}")

    def _probes(self, roots: dict[str, nn.Module]) -> list[Probe]:
        """One probe for each sparse MLP of these parts."""
        probes = []
        for part, root in roots.items():
            for path, mlp in self.plan.mlps.items():
                if path.startswith(PART_PREFIX[part]):
                    inner = path.removeprefix(PART_PREFIX[part])
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
            part: `text` or `vision`: whose parent it is.
            make_dense: Gives the dense run for the dtype that weights are rounded to.
            run_sparse: Gives the sparse results under the same names.
        """
        dense = make_dense(self.plan.dtype)
        probes = self._probes(dense.roots)
        try:
            with all_of([probe.noting() for probe in probes]):
                wanted = dense()
        except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError) as error:
            given = self.plan.parents[parent_of(self.plan, part)].given
            raise ValueError(f"{given} cannot be run, as it is, on {part}: {error}. Mend or replace it.") from error
        with mapped_maths(), all_of([probe.comparing() for probe in probes]):
            got = run_sparse()
        nudged_results = cache(lambda: dense(self._generator(f"{part} nudge")))
        astray = self._first_astray(probes)
        for what, dense_result in wanted.items():
            nudged = partial(lambda what: nudged_results()[what], what)
            self.findings.judge(what, dense_result, got[what], nudged, astray)
        if parent_of(self.plan, part) in self.rounded:
            for what, stored in make_dense(None)().items():
                gap = measure_gap(stored, got[what])
                self.findings.informative[f"{what}, against the parent as it is stored"] = gap

    def _first_astray(self, probes: list[Probe]) -> str:
        """The first MLP that is given something else than its dense one, for messages."""
        given = ((probe.path, self.findings.informative[f"{probe.path}, {GIVEN}"]) for probe in probes)
        first = next((path for path, gap in given if gap > LIMIT), None)
        return "" if first is None else f" (first astray: what {first} is given)"

    def prove_images(self, images: dict[str, Tensor]) -> Tensor:
        """What ViT and connector make of pictures; gives their sparse features, (1, tokens, text width)."""
        body, layers = self.sparse.model, feature_layers(self.plan.config)
        got: dict[str, Tensor] = {}

        def results() -> dict[str, Tensor]:
            got.update(image_results(body.vision_tower, body.connector, images, self.sparse.config, layers))
            return got

        self.compare("vision", lambda dtype: dense_images(self.plan, images, dtype), results)
        return got["image features"]

    def check_placeholders(self, picture_ids: Tensor, num_features: int) -> None:
        """A picture takes as many tokens as it has features.

        Raises:
            ProofError: naming both numbers.
        """
        token = self.sparse.config.image_token_id
        if (num_tokens := int((picture_ids == token).sum())) != num_features:
            raise ProofError(
                f"The processor that was written gives a picture {num_tokens} tokens (num_image_tokens) of the id "
                f"that the configuration names (image_token_id, {token}), but the model gives it {num_features} "
                "features. No checkpoint is written."
            )

    def prove_text(self, picture_ids: Tensor, features: Tensor) -> None:
        """Logits of random tokens, over the parent's vocabulary.

        The picture stands behind them, where a causal model's logits do not know of it.
        """
        vocabulary = self.plan.dense_config.text_config.vocab_size
        tokens = torch.randint(vocabulary - 1, (1, NUM_TOKENS), generator=self._generator("text"))
        tokens[tokens == self.plan.config.image_token_id] = vocabulary - 1
        ids = torch.cat([tokens, picture_ids], dim=1)
        image = BaseModelOutputWithPooling(pooler_output=list(features))  # type: ignore[arg-type]

        def cut(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
            return args, kwargs | {"inputs_embeds": kwargs["inputs_embeds"][:, : NUM_TOKENS + NUM_SEEN]}

        def results() -> dict[str, Tensor]:
            tower = self.sparse.model.language_model
            with hooked(tower.register_forward_pre_hook(cut, with_kwargs=True)):
                logits = self.sparse(input_ids=ids, mm_encoder_outputs={"image": image}, use_cache=False).logits
            if not logits.isfinite().all():
                raise ProofError("The logits behind a picture are not finite. No checkpoint is written.")
            return {"text logits": logits[:, :NUM_TOKENS, :vocabulary]}

        try:
            self.compare("text", lambda dtype: dense_text(self.plan, tokens, dtype), results)
        except ProofError as error:
            if reads_ahead(self.plan, tokens):
                raise ProofError(
                    f"{self.plan.parents[parent_of(self.plan, 'text')].given}: the logits of a token depend on later "
                    "ones: it is an encoder or a prefix LM (is_decoder, use_bidirectional_attention), of which a "
                    "picture behind the tokens changes what is before it. Expected a causal LLM. No checkpoint is "
                    "written."
                ) from error
            raise


@contextmanager
def one_thread() -> Iterator[None]:
    """Few rows times large weights are bound by memory; two threads on busy cores took 20 times as long."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@torch.no_grad()
def prove(plan: UpcyclePlan, folder: Path, reads_all: bool = True) -> Findings:
    """Proves that the files in `folder` compute what the plan's parents compute.

    Args:
        plan: What was to be written.
        folder: What was written.
        reads_all: Whether every byte is read and every expert computed with its own. Else a stack whose experts were
            all given as the same memory is read by its first expert, and some rows of the others compared with it.

    Returns:
        Every measured gap.

    Raises:
        ProofError: naming the tensor, the layer, or the result that differs.
    """
    with one_thread():
        proof = Proof(plan, folder, reads_all)
        try:
            picture_ids, images = process_pictures(plan, folder)
            features = proof.prove_images(images)
            proof.check_placeholders(picture_ids, features.shape[1])
            proof.prove_text(picture_ids, features)
        finally:
            proof.pages.close()
    return proof.findings
