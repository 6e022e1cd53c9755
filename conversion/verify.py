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

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

from modeling_vlmoe.modeling_in_place import is_in_place
from modeling_vlmoe.part_requests import CONTEXT
from modeling_vlmoe.parts_config import feature_layers

from .dense_runs import dense_images, dense_text, image_results, parent_of, reads_ahead
from .gaps import LIMIT, Findings, ProofError
from .host_proof import HostProof
from .part_proofs import PartProof
from .plans import UpcyclePlan
from .probes import hooked
from .written_checkpoint import process_pictures

NUM_TOKENS = 16
NUM_SEEN = 8  # image features that the LLM reads: its cost is not to grow with the picture's tokens

__all__ = ["LIMIT", "ProofError", "prove"]


class Proof(PartProof):
    """The proof of our composite: images and text apart, since its two parents may never have met."""

    def run(self) -> None:
        picture_ids, images = process_pictures(self.plan, self.folder)
        features = self.prove_images(images)
        self.check_placeholders(picture_ids, features.shape[1])
        self.prove_text(picture_ids, features)

    def prove_images(self, images: dict[str, Tensor]) -> Tensor:
        """What ViT and connector make of pictures; gives their sparse features, (1, tokens, text width)."""
        layers = feature_layers(self.plan.config)
        got: list[dict[str, Tensor]] = []

        def results() -> dict[str, Tensor]:
            body = self.sparse.model
            got.append(image_results(body.vision_tower, body.connector, images, self.sparse.config, layers))
            return got[-1]

        self.compare("vision", lambda dtype: dense_images(self.plan, images, dtype), results)
        return got[0]["image features"]

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
            seen, context = slice(NUM_TOKENS + NUM_SEEN), kwargs.get(CONTEXT)
            kwargs = kwargs | {"inputs_embeds": kwargs["inputs_embeds"][:, seen]}
            if context is not None:
                kwargs[CONTEXT] = replace(context, is_image=context.is_image[:, seen])
            return args, kwargs

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
        kind = HostProof if is_in_place(plan.config) else Proof
        proof: PartProof = kind(plan, folder, reads_all)
        try:
            proof.run()
        finally:
            proof.pages.close()
    return proof.findings
