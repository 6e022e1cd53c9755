"""`generate` of a host's VLM that is sparse in place, where a router reads text."""

from typing import Any

from torch import Tensor

from .early_images import given_words
from .host_images import MARKS, PIXELS, context_of_host_images
from .routed_pass import asked
from .visible_text import parts_reading_text, without_text_marks


class EncodesWithText:
    """What `generate` of a host's VLM does otherwise where a router reads text: images are encoded before forward, and
    positions are computed by marks. A base of model classes, before the host's.
    """

    config: Any
    base_model: Any

    def _validate_model_kwargs(self, model_kwargs: dict[str, Any]) -> None:
        if parts_reading_text(self.config):  # forward takes them out where the host's does not know them
            model_kwargs = {name: value for name, value in model_kwargs.items() if name != MARKS}
        super()._validate_model_kwargs(model_kwargs)  # type: ignore[misc]

    def _prepare_position_ids_for_generation(self, inputs_tensor: Tensor, model_kwargs: dict[str, Any]) -> Any:
        if isinstance(mark := model_kwargs.get(MARKS), Tensor) and parts_reading_text(self.config):
            model_kwargs = model_kwargs | {MARKS: without_text_marks(mark)}
        return super()._prepare_position_ids_for_generation(inputs_tensor, model_kwargs)  # type: ignore[misc]

    def _maybe_prepare_encoder_kwargs_for_generation(
        self, inputs_tensor: Tensor, model_kwargs: dict[str, Any], model_input_name: str | None, generation_config: Any
    ) -> dict[str, Any]:
        host: Any = super()
        arguments = inputs_tensor, model_kwargs, model_input_name, generation_config
        is_early = model_kwargs.get(PIXELS) is not None and self._supports_mm_encoder_outputs()  # type: ignore[attr-defined]
        if not (parts_reading_text(self.config) and is_early):
            return host._maybe_prepare_encoder_kwargs_for_generation(*arguments)
        words = given_words(inputs_tensor, model_input_name, model_kwargs)
        mask = model_kwargs.get("attention_mask")
        context = context_of_host_images(self.base_model, None, model_kwargs, mask, **words)
        with asked(self.base_model, context, wants_logits=False):
            return host._maybe_prepare_encoder_kwargs_for_generation(*arguments)
