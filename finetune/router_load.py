"""How many tokens each expert got: counted where the model runs, from the routers' own choices.

>>> with RouterLoad(model) as load:
...     model(**batch)
>>> load.counts[("text", 3)]  # (2, experts): rows are text tokens and image tokens
"""

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from modeling_vlmoe.image_tokens import find_image_tokens
from modeling_vlmoe.modality_routing import is_pooled, open_to
from modeling_vlmoe.parts import connector_blocks, find_towers, has_layers
from modeling_vlmoe.router_losses import RouterLosses
from modeling_vlmoe.routing import RoutedModel
from modeling_vlmoe.towers import tower_layers

# A sparse layer: its part, and its index in the tower (None for the connector).
Layer = tuple[str, int | None]
TEXT, IMAGE = 0, 1
ROWS = {"text": TEXT, "image": IMAGE}


def find_body(model: nn.Module) -> Any:
    """The model without a head inside a model, whatever is wrapped around it: a `VLMoEModel`, or that of a host's VLM.

    Raises:
        ValueError: if there is none.
    """
    for module in model.modules():
        # Of its class, not its attributes: wrappers hand these on, and remote code has a `RoutedModel` of its own.
        if hasattr(type(module), RoutedModel.weigh_losses.__name__):
            return cast(Any, module).base_model
    raise ValueError(f"{type(model).__name__} holds no vlmoe model; give one.")


def find_routers(body: Any) -> dict[Layer, list[RouterLosses]]:
    """The modules that see each sparse layer's routing; of a connector that PEFT trains, the copy too."""
    found: dict[Layer, list[RouterLosses]] = {}
    holders: list[tuple[Layer, nn.Module]] = [(("connector", None), nn.ModuleList(connector_blocks(body)))]
    for part, (_, tower) in find_towers(body).items():
        if has_layers(tower):
            holders += [((part, index), layer) for index, layer in enumerate(tower_layers(tower)[1])]
    for key, holder in holders:
        if routers := [module for module in holder.modules() if isinstance(module, RouterLosses)]:
            found[key] = routers
    return found


@dataclass(frozen=True)
class LoadSummary:
    """One layer's load. Only experts that a token could have been sent to count: where tokens are routed by modality,
    those that are open to some that there were.

    Attributes:
        max_load: the largest share of assignments that one expert got; 1 / experts when even.
        entropy: of the shares, divided by log(experts): 1 when even, 0 when one expert got all.
        dead_experts: experts that got nothing.
    """

    max_load: float
    entropy: float
    dead_experts: int


def summarize(count_E: Tensor, open_E: Tensor | None = None) -> LoadSummary:
    """A layer's load from its experts' counts, (experts,).

    Args:
        count_E: (experts,).
        open_E: which experts a token could have been sent to, (experts,); None for all.
    """
    if open_E is not None:
        count_E = count_E[open_E.to(count_E.device)]
    share_E = count_E.double() / count_E.sum().clamp(min=1)
    num_experts = len(count_E)
    entropy = torch.special.entr(share_E).sum() / torch.log(torch.tensor(float(max(num_experts, 2))))
    return LoadSummary(share_E.max().item(), entropy.item(), int((count_E == 0).sum()))


class RouterLoad:
    """Counts the assignments of each expert while it is attached; padding is left out, by the attention mask.

    Only what happens inside the model's forward counts, so a layer that gradient checkpointing runs again in backward
    counts once. Image tokens are told from text tokens in the LLM; in ViT and connector all are image tokens. Each
    process counts its own. Images that `generate` encodes before forward are not seen.
    Image features that a caller has put into `inputs_embeds` count as text unless `mm_token_type_ids` is given.

    Args:
        model: a vlmoe model, also wrapped by PEFT.
        training_only: whether passes in eval mode are left out.

    Attributes:
        counts: per sparse layer, (2, experts): assignments of text tokens and of image tokens.
        losses: per sparse layer, the sum of its (balance, z) losses and how many passes there were; in training only.
    """

    def __init__(self, model: nn.Module, training_only: bool = False):
        self.body = find_body(model)
        self.training_only = training_only
        self.counts: dict[Layer, Tensor] = {}
        self.losses: dict[Layer, tuple[Tensor, int]] = {}
        self._handles: list[Any] = []
        self._is_running = False
        self._token_mask: Tensor | None = None
        self._image_mask: Tensor | None = None

    def attach(self) -> "RouterLoad":
        """Starts counting."""
        self.detach()
        self._handles.append(self.body.register_forward_pre_hook(self._start, with_kwargs=True))
        self._handles.append(self.body.register_forward_hook(self._stop, always_call=True))
        for layer, routers in find_routers(self.body).items():
            for router in routers:
                self._handles.append(router.register_forward_hook(self._counter(layer)))
        return self

    def detach(self) -> None:
        """Stops counting and removes every hook."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._is_running = False

    def reset(self) -> None:
        """Forgets what was counted."""
        self.counts.clear()
        self.losses.clear()

    def __enter__(self) -> "RouterLoad":
        return self.attach()

    def __exit__(self, *_: Any) -> None:
        self.detach()

    def summary(self) -> dict[Layer, LoadSummary]:
        """Each layer's load, text and image tokens together."""
        return {
            layer: summarize(count_ME.sum(0), self.open_experts(layer)[count_ME.any(1).cpu()].any(0))
            for layer, count_ME in sorted(self.counts.items(), key=str)
        }

    def summary_of(self, modality: str) -> dict[Layer, LoadSummary]:
        """Each layer's load by the tokens of "image" or "text" alone; layers that had none are left out."""
        row = ROWS[modality]
        return {
            layer: summarize(count_ME[row], self.open_experts(layer)[row])
            for layer, count_ME in sorted(self.counts.items(), key=str)
            if count_ME[row].any()
        }

    def open_experts(self, layer: Layer) -> Tensor:
        """Which of a layer's experts are open to text tokens and to image tokens, (2, experts)."""
        open_ME = torch.ones(self.counts[layer].shape, dtype=torch.bool)
        if layer[0] == "text" and is_pooled(moe := self.body.config.text_moe):
            open_ME[:] = False
            for modality, row in ROWS.items():
                open_ME[row, open_to(moe, modality)] = True
        return open_ME

    def mean_losses(self) -> dict[Layer, Tensor]:
        """Each layer's (balance, z) losses, averaged over the passes in training."""
        return {layer: total / passes for layer, (total, passes) in self.losses.items()}

    def _start(self, body: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._is_running = body.training or not self.training_only
        input_ids = kwargs.get("input_ids", args[0] if args else None)
        marks = kwargs.get("mm_token_type_ids")
        is_image = find_image_tokens(body, input_ids, kwargs.get("inputs_embeds"), marks)
        mask = kwargs.get("attention_mask")
        self._image_mask = is_image
        self._token_mask = mask if isinstance(mask, Tensor) and mask.ndim == 2 else None

    def _stop(self, *_: Any) -> None:
        self._is_running = False

    def _counter(self, layer: Layer) -> Any:
        @torch.no_grad()
        def count(router: RouterLosses, args: tuple[Any, ...], output: tuple[Any, ...]) -> None:
            num_experts, expert_TK, context = args[0].shape[-1], args[2], args[3]
            # Without a context nothing is learnt: a reference's pass, or a blank image (`modeling_vlmoe.blank_image`).
            if not self._is_running or (self.training_only and (context is None or not context.learns)):
                return
            kind_T, mask_T = self._kinds(layer, expert_TK)
            cell_TK = kind_T[:, None] * num_experts + expert_TK
            count_ME = torch.bincount(cell_TK[mask_T].reshape(-1), minlength=2 * num_experts).view(2, num_experts)
            self.counts[layer] = self.counts[layer] + count_ME if layer in self.counts else count_ME
            if output[2] is not None:
                total, passes = self.losses.get(layer, (0, 0))
                self.losses[layer] = (total + output[2], passes + 1)

        return count

    def _kinds(self, layer: Layer, expert_TK: Tensor) -> tuple[Tensor, Tensor]:
        """For each token that was routed: text or image, and whether it is real."""
        num_tokens, device = expert_TK.shape[0], expert_TK.device
        if layer[0] != "text":
            kind_T = torch.full((num_tokens,), IMAGE, device=device)
            return kind_T, torch.ones(num_tokens, dtype=torch.bool, device=device)
        kind_T = torch.full((num_tokens,), TEXT, device=device)
        if self._image_mask is not None and self._image_mask.numel() == num_tokens:
            kind_T = self._image_mask.reshape(-1).to(device, torch.long)
        mask_T = torch.ones(num_tokens, dtype=torch.bool, device=device)
        if self._token_mask is not None:
            # With a cache the mask covers the past too; the last columns are this pass'.
            num_columns = num_tokens // self._token_mask.shape[0]
            mask_T = self._token_mask[:, -num_columns:].reshape(-1).to(device).bool()
        return kind_T, mask_T
