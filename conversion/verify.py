"""The proof: what was written computes what the parents compute. It reads the written files, and the parents' own.

Dense and sparse models are the host's and ours, with their weights mapped from the files and all maths in float32.
Each MLP is compared on random input, of which every expert gets some, and the whole on what it gives: logits of random
tokens, features of random pixels. The gap is the largest difference in standard deviations of the dense result; above
`LIMIT` there is no checkpoint. The dense side is the parent in the dtype that is written: a cast is the user's wish
(the receipt names it), an error is not.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from modeling_vlmoe import VLMoEForConditionalGeneration
from modeling_vlmoe.sparse_moe import Experts

from .dense_tensors import dense_model
from .mapped_maths import mapped_maths
from .mapping import PART_PREFIX
from .meta_models import build_on_meta, fill_mapped
from .page_flow import PageFlow
from .planning import UpcyclePlan
from .probes import Probe, ProofError, all_riding, measure_gap
from .seeding import tensor_generator
from .streaming import CheckpointReader

LIMIT = 1e-5
NUM_TOKENS = 32

__all__ = ["LIMIT", "ProofError", "prove"]


def sparse_model(plan: UpcyclePlan, reader: CheckpointReader) -> PreTrainedModel:
    """The written model, mapped from its files; experts run by the plain loop."""
    model = build_on_meta(lambda: VLMoEForConditionalGeneration(copy.deepcopy(plan.config)))
    for module in model.modules():
        if isinstance(module, Experts):
            module.config._experts_implementation_internal = "eager"
    return fill_mapped(model, reader.tensor)


def expert_pages(plan: UpcyclePlan, reader: CheckpointReader, model: PreTrainedModel) -> PageFlow:
    """Lets go of each stack of experts when it has run: the model may be larger than the memory that is free."""
    pages = PageFlow()
    for path in plan.mlps:
        experts = model.get_submodule(f"{path}.experts")
        names = [f"{path}.experts.{name}" for name, _ in experts.named_parameters(recurse=False)]
        pages.let_go_after(experts, [reader.span(name) for name in names])
    return pages


def reference_model(plan: UpcyclePlan, role: str) -> PreTrainedModel:
    """A dense parent in its own class, mapped from its files, rounded to the dtype that is written."""
    tensors = plan.dense[role]
    return fill_mapped(dense_model(tensors.parent), tensors.tensor, plan.dtype)


def judge(what: str, gap: float) -> float:
    """Gives the gap back, if it is small enough.

    Raises:
        ProofError: saying what differs by how much.
    """
    if not gap <= LIMIT:
        raise ProofError(
            f"The sparse model is not its dense parents: {what} differs by {gap:.2g} standard deviations, "
            f"{LIMIT:g} are allowed. No checkpoint is written."
        )
    return gap


class Proof:
    """One proof of one written folder.

    Args:
        plan: What was to be written.
        folder: What was written.
    """

    def __init__(self, plan: UpcyclePlan, folder: Path):
        self.plan = plan
        reader = CheckpointReader(folder)
        self.sparse = sparse_model(plan, reader)
        self.pages = expert_pages(plan, reader, self.sparse)
        self.gaps: dict[str, float] = {}

    def _generator(self, name: str) -> torch.Generator:
        return tensor_generator(self.plan.drawing.seed, f"proof of {name}")

    def compare(
        self,
        part: str,
        dense_root: nn.Module,
        run_dense: Callable[[], dict[str, Tensor]],
        run_sparse: Callable[[], dict[str, Tensor]],
    ) -> dict[str, Tensor]:
        """Runs a part dense and sparse with probes in its MLPs, and judges them and the results; gives the dense ones.

        Args:
            part: `text`, `vision` or `connector`.
            dense_root: Holds the dense MLPs, under their paths in the part.
            run_dense: Gives the dense results by what they are.
            run_sparse: Gives the sparse ones.
        """
        prefix = PART_PREFIX[part]
        probes = []
        for path, mlp in self.plan.mlps.items():
            if path.startswith(prefix):
                dense = dense_root.get_submodule(path.removeprefix(prefix))
                width = dense.get_parameter(mlp.dense_names(f"{mlp.layout.input_stack}")[0]).shape[1]
                probes.append(Probe(path, dense, self.sparse.get_submodule(path), width, self.plan.drawing.seed))
        with mapped_maths(self.plan.dtype), all_riding([(probe, probe.dense) for probe in probes]):
            wanted = run_dense()
        with mapped_maths(), all_riding([(probe, probe.sparse) for probe in probes]):
            got = run_sparse()
        strayed = []
        for probe in probes:
            gaps = probe.gaps()
            self.gaps |= {f"{probe.path}, {where}": gap for where, gap in gaps.items()}
            judge(f"{probe.path} on random input", gaps["random input"])
            if gaps["in the model"] > LIMIT:
                strayed.append(probe.path)
        for what, dense_result in wanted.items():
            gap = measure_gap(dense_result, got[what])
            self.gaps[what] = gap
            judge(f"{what} (first astray: {strayed[0]})" if strayed else what, gap)
        return wanted

    def prove_text(self) -> None:
        """Logits of random tokens, over the parent's vocabulary."""
        role = "text" if "text" in self.plan.dense else "vlm"
        reference = reference_model(self.plan, role)
        root: Any = reference.base_model if role == "text" else reference.model.language_model
        vocabulary = root.get_input_embeddings().weight.shape[0]
        tokens = torch.randint(vocabulary - 1, (1, NUM_TOKENS), generator=self._generator("text"))
        tokens[tokens == self.plan.config.image_token_id] = vocabulary - 1

        def logits(model: nn.Module) -> dict[str, Tensor]:
            return {"text logits": model(input_ids=tokens, use_cache=False).logits[..., :vocabulary]}

        self.compare("text", root, lambda: logits(reference), lambda: logits(self.sparse))

    def prove_vision(self) -> Tensor:
        """Everything the ViT gives for random pixels, and what the connector reads of it; gives the latter."""
        role = "vision" if "vision" in self.plan.dense else "vlm"
        reference = reference_model(self.plan, role)
        tower = reference if role == "vision" else reference.model.vision_tower
        pixels = torch.randn(self.plan.pixel_shape, generator=self._generator("vision"))
        config = self.plan.config
        layers = config.vision_feature_layer
        layers = [layers] if isinstance(layers, int) else list(layers)

        def features(model: nn.Module) -> dict[str, Tensor]:
            outputs = model(pixel_values=pixels, output_hidden_states=True)
            found = {f"vision hidden state {layer}": outputs.hidden_states[layer] for layer in layers}
            found["vision last hidden state"] = outputs.last_hidden_state
            if outputs.get("pooler_output") is not None:
                found["vision pooled output"] = outputs.pooler_output
            return found

        found = self.compare(
            "vision", tower, lambda: features(tower), lambda: features(self.sparse.model.vision_tower)
        )
        return torch.cat([found[f"vision hidden state {layer}"] for layer in layers], dim=-1)

    def prove_connector(self, features: Tensor) -> None:
        """The connector on the ViT's features."""
        prefix = PART_PREFIX["connector"]
        dense_vlm = build_on_meta(lambda: VLMoEForConditionalGeneration(copy.deepcopy(self.plan.dense_config)))
        dense = dense_vlm.model.connector
        fill_mapped(dense, lambda name: self.plan.dense_tensors[prefix + name].read(), self.plan.dtype)
        sparse = self.sparse.model.connector
        self.compare(
            "connector",
            dense,
            lambda: {"connector output": dense.mlp(features)},
            lambda: {"connector output": sparse.mlp(features)},
        )


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
def prove(plan: UpcyclePlan, folder: Path) -> dict[str, float]:
    """Proves that the files in `folder` compute what the plan's parents compute.

    Returns:
        Every measured gap.

    Raises:
        ProofError: naming the layer, or the result, that differs.
    """
    with one_thread():
        proof = Proof(plan, folder)
        try:
            proof.prove_connector(proof.prove_vision())
            proof.prove_text()
        finally:
            proof.pages.close()
    return proof.gaps
