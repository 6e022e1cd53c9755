"""The text gate: what the text that is visible to an image adds to the router logits of the image's tokens.

MATHS 6, after the source documents' attention gate (S3). For an image that sees the words t_i, expert k has

    a_ki = softmax over i of q_k . (W_K t_i) / sqrt(d_g)
    g_k  = u_k . sum_i a_ki (W_V t_i)

and the logits of its tokens x are z = W_r x + g. With one u for all experts, scalar values v_i = u . W_V t_i and
W_r = 0 these are the documents' w_k = exp(sum_i a_ki v_i) / sum_j exp(sum_i a_ji v_i). With u = 0, as it is at the
start, the router is the plain one. An image that sees no text has g = 0.

Shapes: I images, B samples, L words, E experts, G the gate's width (d_g, and the values' width too), W text width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init

from .part_images import PartImages


class TextGate(nn.Module):
    """One sparse layer's gate, in float32 whatever the model's dtype.

    Args:
        num_experts: E.
        text_width: W.
        width: G.

    Attributes:
        queries: q, (E, G).
        keys: W_K, (G, W).
        values: W_V, (G, W).
        readout: u, (E, G).
        is_silent: whether g is 0 whatever the text: a proof runs parts without the text around them.
    """

    is_silent: bool = False

    def __init__(self, num_experts: int, text_width: int, width: int):
        super().__init__()
        self.queries = nn.Parameter(torch.empty(num_experts, width))
        self.keys = nn.Parameter(torch.empty(width, text_width))
        self.values = nn.Parameter(torch.empty(width, text_width))
        self.readout = nn.Parameter(torch.empty(num_experts, width))

    def reset_parameters(self) -> None:
        """Keys and values uniform with variance 1 / (3 W), queries standard normal, so that the experts' attention
        differs at any width; u = 0.
        """
        bound = self.keys.shape[1] ** -0.5
        init.uniform_(self.keys, -bound, bound)
        init.uniform_(self.values, -bound, bound)
        init.normal_(self.queries)
        init.zeros_(self.readout)

    def of_images(self, images: PartImages) -> Tensor:
        """g of each image, (I, E).

        The products are folded: q_k . (W_K t) = (W_K^T q_k) . t, and so for the values, so that a word costs two
        products of its width per expert.
        """
        text, device = images.text, self.queries.device
        assert text is not None
        words_BLW = text.embeddings.to(device)
        sample_I, is_visible_IL1 = text.sample.to(device), text.is_visible.to(device)[..., None]
        width = self.queries.shape[1]
        score_BLE = F.linear(words_BLW, self.queries.float() @ self.keys.float() * width**-0.5)
        value_BLE = F.linear(words_BLW, self.readout.float() @ self.values.float())
        # Filled with the lowest number, not with -inf: an image without text would have NaN.
        score_ILE = score_BLE[sample_I].masked_fill(~is_visible_IL1, torch.finfo(score_BLE.dtype).min)
        attention_ILE = score_ILE.softmax(1) * is_visible_IL1
        return (attention_ILE * value_BLE[sample_I]).sum(1)

    def forward(self, images: PartImages | None, num_tokens: int) -> Tensor | float:
        """What is added to the logits of the part's tokens, (tokens, E).

        Args:
            images: whose tokens they are, and what text these see.
            num_tokens: how many there are.

        Raises:
            ValueError: if the text is not known.
        """
        if self.is_silent:
            return 0.0
        if images is None or images.text is None:
            raise ValueError(
                'A router of router_type "attention" reads the text that belongs to an image, but was not told it. '
                "Call the whole model, or its generate, and pass input_ids, pixel_values and mm_token_type_ids as the "
                "model's own processor gives them: images encoded alone (get_image_features, the vision tower) have "
                "no text."
            )
        gate_IE = self.of_images(images)
        return gate_IE[images.of_token(num_tokens, gate_IE.device)]


def silence(model: nn.Module, is_silent: bool = True) -> None:
    """Has all gates below a module add nothing, or what they compute; silent ones need not be told the text."""
    for module in model.modules():
        if isinstance(module, TextGate):
            module.is_silent = is_silent
        elif hasattr(type(module), "ignores_text"):
            setattr(module, "ignores_text", is_silent)  # noqa: B010 (of a `RoutedModel`, unknown to type checkers here)
