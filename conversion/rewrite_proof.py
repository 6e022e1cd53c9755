"""What a checkpoint with experts of another form computes, beside the one that it was made of.

All maths in float32 on weights mapped from the files. Densified experts are proved: each block, past its router too,
the image features and the logits are what the delta experts compute with their weights summed, and rounded where the
written dtype rounds. Compressed ones are measured: how far each expert's weights are from what they were, and the
features and logits.
"""

from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

from modeling_vlmoe.delta_experts import DeltaExperts
from modeling_vlmoe.sparse_moe import Experts

from .block_probes import BlockProbe
from .dense_runs import image_results
from .dense_tensors import dense_model
from .gaps import Findings, measure_gap, nudge
from .mapped_maths import mapped_maths
from .mapping import EXPERTS
from .meta_models import fill_mapped
from .probes import all_of, hooked
from .rewrite_plan import CLAIM, RewritePlan
from .seeding import tensor_generator
from .streaming import CheckpointReader
from .verify import one_thread
from .written_checkpoint import check_weights, open_model, process_pictures

NUM_TOKENS, NUM_FEATURES = 16, 8
LOGITS, FEATURES = "logits", "image features"


class SummedExperts(nn.Module):
    """Delta experts by the plain loop over their summed weights, one expert at a time.

    Args:
        experts: the delta experts.
        dtype: what sums are rounded to, as whole experts are written.
    """

    def __init__(self, experts: DeltaExperts, dtype: torch.dtype):
        super().__init__()
        self.experts, self.dtype, self.num_experts = experts, dtype, experts.num_experts

    def weight(self, name: str, expert: int) -> Tensor:
        a, b = (getattr(self.experts.deltas, f"{name}_{pair}")[expert] for pair in "ab")
        return (getattr(self.experts, name).float() + b.float() @ a.float()).to(self.dtype).float()

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """As `Experts.forward`."""
        up, deltas = self.experts.input_stack, self.experts.deltas
        out = hidden_states.new_zeros(hidden_states.shape[0], self.experts.down_proj.shape[0])
        for expert in range(self.num_experts):
            token, pick = torch.where(top_k_index == expert)
            biases = [getattr(deltas, f"{name}_bias", None) for name in (up, "down_proj")]
            up_bias, down_bias = (None if bias is None else bias[expert] for bias in biases)
            hidden = self.experts.activate(F.linear(hidden_states[token], self.weight(up, expert), up_bias))
            hidden = F.linear(hidden, self.weight("down_proj", expert), down_bias)
            out = out.index_add(0, token, hidden * top_k_weights[token, pick, None])
        return out


def open_source(plan: RewritePlan) -> Any:
    """The checkpoint, mapped from its files; experts run by the plain loop."""
    model = dense_model(plan.source)
    for module in model.modules():
        if isinstance(module, Experts):
            module.config._experts_implementation_internal = "eager"
    return fill_mapped(model, plan.tensors.tensor)


class Rewriting:
    """Both models, and what they make of the same inputs.

    Args:
        plan: What was to be written.
        folder: What was written.

    Raises:
        ProofError: when the files do not hold what they were to hold.
    """

    def __init__(self, plan: RewritePlan, folder: Path):
        self.plan = plan
        self.reader = CheckpointReader(folder)
        check_weights(plan.mapping, plan.drawing, self.reader, set())
        self.source, self.written = open_source(plan), open_model(plan, folder, self.reader, set())  # type: ignore[arg-type]
        self.images = process_pictures(plan, folder)[1]  # type: ignore[arg-type]
        self.findings = Findings(claim=CLAIM)

    def _generator(self, name: str) -> torch.Generator:
        return tensor_generator(self.plan.drawing.seed, f"proof of {name}")

    def results(self, model: Any, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """Image features, and the logits of text with the beginning of a picture in the middle."""
        body, config = model.model, self.plan.config

        def change(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
            return output if generator is None else nudge(output, generator)

        images = self.images
        if generator is not None:
            images = images | {"pixel_values": nudge(images["pixel_values"], generator)}
        with mapped_maths(), hooked(model.get_input_embeddings().register_forward_hook(change)):
            features = image_results(body.vision_tower, body.connector, images, config, layers=[])[FEATURES]
            token, vocabulary = config.image_token_id or 0, config.text_config.vocab_size
            text = torch.randint(vocabulary, (1, 2 * NUM_TOKENS), generator=self._generator("text"))
            text[text == token] = 0 if token else 1
            picture = features[:1, :NUM_FEATURES]
            ids = [text[:, :NUM_TOKENS], torch.full((1, picture.shape[1]), token), text[:, NUM_TOKENS:]]
            image = BaseModelOutputWithPooling(pooler_output=list(picture))  # type: ignore[arg-type]
            given = {"input_ids": torch.cat(ids, dim=1), "mm_encoder_outputs": {"image": image}, "use_cache": False}
            return {FEATURES: features, LOGITS: model(**given).logits}

    def prove(self) -> Findings:
        """Judges whether both compute the same.

        Raises:
            ProofError: naming what differs.
        """
        unrounded = self.results(self.source)
        dtypes = {one.spec.name: one.spec.dtype for one in self.plan.mapping.assignments}
        probes = []
        for path in self.plan.rewritten:
            block, made = self.source.get_submodule(path), self.written.get_submodule(path)
            block.experts = SummedExperts(block.experts, dtypes[f"{path}{EXPERTS}down_proj"])
            run = partial(block.__class__.__call__, block)
            seed = self.plan.drawing.seed
            probes.append(BlockProbe(path, block, run, made, None, seed, self.findings))  # type: ignore[arg-type]
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

    def _errors(self, path: str) -> list[tuple[str, dict[str, float]]]:
        found = []
        for name in self.source.get_submodule(path).experts.stacks:
            stack = self.plan.tensors.tensor(f"{path}{EXPERTS}{name}")
            base = self.reader.tensor(f"{path}{EXPERTS}{name}").float()
            a, b = (self.reader.tensor(f"{path}{EXPERTS}deltas.{name}_{pair}").float() for pair in "ab")
            errors = torch.stack(
                [
                    (expert.float() - base - one_b @ one_a).norm() / expert.float().norm()
                    for expert, one_a, one_b in zip(stack, a, b, strict=True)
                ]
            )
            found.append((f"{path}{EXPERTS}{name}", {"mean": errors.mean().item(), "max": errors.max().item()}))
        return found


@torch.no_grad()
def prove_densified(plan: RewritePlan, folder: Path) -> tuple[Findings, dict[str, dict[str, float]]]:
    """Proves that the files in `folder` compute what the plan's checkpoint computes.

    Returns:
        Every measured gap, and no errors of weights.

    Raises:
        ProofError: naming the tensor, the block, or the result that differs.
    """
    with one_thread():
        return Rewriting(plan, folder).prove(), {}


@torch.no_grad()
def measure_compressed(plan: RewritePlan, folder: Path) -> tuple[Findings, dict[str, dict[str, float]]]:
    """Measures how far the files in `folder` are from the plan's checkpoint.

    Returns:
        The gaps of results, and the relative errors of each stack of experts.

    Raises:
        ProofError: naming the tensor that was not written as it was to be.
    """
    with one_thread():
        return Rewriting(plan, folder).measure()
