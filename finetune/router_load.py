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
from modeling_vlmoe.parts import connector_blocks, find_towers, has_layers
from modeling_vlmoe.router_losses import RouterContext, RouterLosses, probabilities
from modeling_vlmoe.routers import Router
from modeling_vlmoe.routing import RoutedModel
from modeling_vlmoe.towers import tower_layers

from .routing_alarms import Layer

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


def find_routers(body: Any) -> dict[Layer, list[Router | RouterLosses]]:
    """The modules that see each sparse layer's routing: its router, and what computes its losses; of what PEFT trains
    whole, the copies too.
    """
    found: dict[Layer, list[Router | RouterLosses]] = {}
    holders: list[tuple[Layer, nn.Module]] = [(("connector", None), nn.ModuleList(connector_blocks(body)))]
    for part, (_, tower) in find_towers(body).items():
        if has_layers(tower):
            holders += [((part, index), layer) for index, layer in enumerate(tower_layers(tower)[1])]
    for key, holder in holders:
        if routers := [module for module in holder.modules() if isinstance(module, (Router, RouterLosses))]:
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


@dataclass(frozen=True)
class Routed:
    """What one pass of a layer's router has done.

    Attributes:
        chosen_TE: which experts each token was sent to, bool; all, some or none of them where experts choose tokens.
        weight_TE: with what weights, 0 where it was not sent.
        probability_TE: the router's shares (see `modeling_vlmoe.router_losses.probabilities`), 0 for closed experts.
        open_TE: which experts were open to each token, bool.
        kind_T: TEXT or IMAGE.
        mask_T: which tokens are real, bool.
    """

    chosen_TE: Tensor
    weight_TE: Tensor
    probability_TE: Tensor
    open_TE: Tensor
    kind_T: Tensor
    mask_T: Tensor

    @property
    def first_T(self) -> Tensor:
        """The expert that each token was sent to with the largest weight; -1 where it was sent to none."""
        best_T = self.weight_TE.masked_fill(~self.chosen_TE, -1.0).argmax(-1)
        return best_T.masked_fill(~self.chosen_TE.any(-1), -1)

    @property
    def confidence_T(self) -> Tensor:
        """Each token's largest share."""
        return self.probability_TE.amax(-1)

    @property
    def has_choice_T(self) -> Tensor:
        """Which tokens had two experts or more to choose from."""
        return self.open_TE.sum(-1) > 1


def read_routing(output: tuple[Tensor, ...], moe: Any, kind_T: Tensor, mask_T: Tensor) -> Routed:
    """What a router has done, from what it gives.

    Args:
        output: its logits, the lowest number for an expert that is closed to a token; weights and chosen experts, (T,
            K); or where experts choose tokens those of rows, (R, 1), and each row's token, (R,).
        moe: the part's `MoEConfig`.
        kind_T: TEXT or IMAGE, for each token.
        mask_T: which tokens are real.
    """
    logits_TE, weight_RK, expert_RK, *token_R = output
    index_RK = expert_RK
    if token_R:
        index_RK = (token_R[0][:, None] * logits_TE.shape[1] + expert_RK).view(1, -1)
        weight_RK = weight_RK.reshape(1, -1)
    shape = (1, logits_TE.numel()) if token_R else logits_TE.shape
    weight_TE = logits_TE.new_zeros(shape).scatter(1, index_RK, weight_RK.detach().to(logits_TE.dtype))
    chosen_TE = torch.zeros_like(weight_TE, dtype=torch.bool).scatter(1, index_RK, True)
    return Routed(
        chosen_TE.view_as(logits_TE),
        weight_TE.view_as(logits_TE),
        probabilities(logits_TE.detach(), moe.router_type),
        ~(logits_TE <= torch.finfo(logits_TE.dtype).min),  # one that is not a number is open
        kind_T,
        mask_T,
    )


def summarize(count_E: Tensor) -> LoadSummary:
    """A layer's load from its experts' counts, (experts,); zeros where no expert was open to a token."""
    if not len(count_E):
        return LoadSummary(0.0, 0.0, 0)
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
        open: per sparse layer, (2, experts): which experts were open to some text token, to some image token.
        confidence: per sparse layer, (2, 2): for text and for image tokens that had a choice, the sum of their largest
            shares, and how many tokens these were.
        losses: per sparse layer, the sum of its (balance, z) losses and how many passes there were; in training only.
    """

    def __init__(self, model: nn.Module, training_only: bool = False):
        self.body = find_body(model)
        self.training_only = training_only
        self.counts: dict[Layer, Tensor] = {}
        self.open: dict[Layer, Tensor] = {}
        self.confidence: dict[Layer, Tensor] = {}
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
                see = self._counter(layer) if isinstance(router, Router) else self._adder(layer)
                self._handles.append(router.register_forward_hook(see))
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
        self.open.clear()
        self.confidence.clear()
        self.losses.clear()

    def __enter__(self) -> "RouterLoad":
        return self.attach()

    def __exit__(self, *_: Any) -> None:
        self.detach()

    def summary(self) -> dict[Layer, LoadSummary]:
        """Each layer's load, text and image tokens together, over the experts that were open to some of them."""
        return {
            layer: summarize(count_ME.sum(0)[self.open[layer].any(0)])
            for layer, count_ME in sorted(self.counts.items(), key=str)
        }

    def summary_of(self, modality: str) -> dict[Layer, LoadSummary]:
        """Each layer's load by the tokens of "image" or "text" alone, over the experts that were open to some of them;
        layers that had none are left out.
        """
        row = ROWS[modality]
        return {
            layer: summarize(count_ME[row][self.open[layer][row]])
            for layer, count_ME in sorted(self.counts.items(), key=str)
            if count_ME[row].any()
        }

    def mean_confidence(self) -> dict[Layer, dict[int, tuple[float, int]]]:
        """For each layer and kind of token that it saw, the mean of the tokens' largest shares, and their number."""
        found: dict[Layer, dict[int, tuple[float, int]]] = {}
        for layer, sure_M2 in self.confidence.items():
            for kind, (total, number) in enumerate(sure_M2.tolist()):
                if number:
                    found.setdefault(layer, {})[kind] = (total / number, int(number))
        return found

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

    def _counts(self, context: RouterContext | None) -> bool:
        """Whether a pass counts. Without a context nothing is learnt: a reference's pass, or a blank image
        (`modeling_vlmoe.blank_image`).
        """
        return self._is_running and (not self.training_only or (context is not None and context.learns))

    def _counter(self, layer: Layer) -> Any:
        @torch.no_grad()
        def count(router: Router, args: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
            if self._counts(args[1] if len(args) > 1 else None):
                self.take(layer, read_routing(output, router.moe, *self._kinds(layer, output[0])))

        return count

    def _adder(self, layer: Layer) -> Any:
        def add(losses: RouterLosses, args: tuple[Any, ...], output: tuple[Any, ...]) -> None:
            if self._counts(args[3]) and output[2] is not None:
                total, passes = self.losses.get(layer, (0, 0))
                self.losses[layer] = (total + output[2], passes + 1)

        return add

    def take(self, layer: Layer, routed: Routed) -> None:
        """Counts one pass of a layer."""
        is_kind_MT = torch.stack([routed.kind_T == TEXT, routed.kind_T == IMAGE]) & routed.mask_T
        count_ME = is_kind_MT.float() @ routed.chosen_TE.float()
        sure_MT = (is_kind_MT & routed.has_choice_T).float()
        sure_M2 = torch.stack([sure_MT @ routed.confidence_T, sure_MT.sum(-1)], dim=-1)
        for totals, found in ((self.counts, count_ME.long()), (self.confidence, sure_M2)):
            totals[layer] = totals[layer] + found if layer in totals else found
        open_ME = is_kind_MT.float() @ routed.open_TE.float() > 0
        self.open[layer] = self.open[layer] | open_ME if layer in self.open else open_ME

    def _kinds(self, layer: Layer, logits_TE: Tensor) -> tuple[Tensor, Tensor]:
        """For each token that was routed: text or image, and whether it is real."""
        num_tokens, device = logits_TE.shape[0], logits_TE.device
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
