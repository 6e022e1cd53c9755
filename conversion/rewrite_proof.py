"""What a checkpoint with experts of another form computes, beside the one that it was made of: see `rewritten_models`.

Our composite is given a picture of noise, and text with the beginning of that picture in the middle; a host's VLM that
is sparse in place what its processor makes (`host_rewrite_proof`).
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

from .dense_runs import image_results
from .gaps import Findings, nudge
from .host_rewrite_proof import HostRewriting
from .mapped_maths import mapped_maths
from .probes import hooked
from .rewrite_plan import HostRewritePlan, RewritePlan
from .rewritten_models import Rewriting
from .verify import one_thread
from .written_checkpoint import process_pictures

NUM_TOKENS, NUM_FEATURES = 16, 8
LOGITS, FEATURES = "logits", "image features"
ROUTING_CLAIM = "The model that is routed otherwise is not the checkpoint, though it should be"


class CompositeRewriting(Rewriting):
    """Both of our composites: their image features and logits.

    Args:
        plan: What was to be written.
        folder: What was written.

    Raises:
        ProofError: when the files do not hold what they were to hold.
    """

    def __init__(self, plan: RewritePlan, folder: Path):
        super().__init__(plan, folder)
        self.images = process_pictures(plan, folder)[1]  # type: ignore[arg-type]

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


def both_models(plan: RewritePlan, folder: Path) -> Rewriting:
    """The checkpoint and what was written, ready to run.

    Raises:
        ProofError: when the files do not hold what they were to hold.
    """
    return HostRewriting(plan, folder) if isinstance(plan, HostRewritePlan) else CompositeRewriting(plan, folder)


@torch.no_grad()
def prove_densified(plan: RewritePlan, folder: Path) -> tuple[Findings, dict[str, dict[str, float]]]:
    """Proves that the files in `folder` compute what the plan's checkpoint computes.

    Returns:
        Every measured gap, and no errors of weights.

    Raises:
        ProofError: naming the tensor, the block, or the result that differs.
    """
    with one_thread():
        return both_models(plan, folder).prove(), {}


@torch.no_grad()
def measure_compressed(plan: RewritePlan, folder: Path) -> tuple[Findings, dict[str, dict[str, float]]]:
    """Measures how far the files in `folder` are from the plan's checkpoint.

    Returns:
        The gaps of results, and the relative errors of each stack of experts.

    Raises:
        ProofError: naming the tensor that was not written as it was to be.
    """
    with one_thread():
        return both_models(plan, folder).measure()


@torch.no_grad()
def check_routing(plan: RewritePlan, folder: Path) -> tuple[Findings, dict[str, dict[str, float]]]:
    """Proves that the files in `folder` compute what the plan's checkpoint computes, where they are to; else measures
    how far they are from it.

    Returns:
        The gaps of results, and no errors of weights.

    Raises:
        ProofError: naming the tensor, or the result that differs.
    """
    with one_thread():
        return both_models(plan, folder).compare(plan.is_exact, ROUTING_CLAIM), {}
