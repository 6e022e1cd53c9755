"""Measuring a family: a tiny dense model of it goes through the product's own conversion, and is compared with itself.

A text family is upcycled beside a fixed ViT, with the proof, and the written checkpoint's logits are compared with
those of its own `ForCausalLM`. A vision family's tower is made sparse in memory and compared on whatever it reads; one
that reads pixels is upcycled beside a fixed LLM too.
"""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from PIL import Image
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoProcessor, PreTrainedConfig

from modeling_vlmoe import MoEConfig, register
from modeling_vlmoe.moe_config import sparse_fields
from modeling_vlmoe.towers import find_dense_mlp, make_sparse, tower_layers

from ..arguments import UpcycleArguments
from ..gaps import LIMIT, measure_gap
from ..parents import BROKEN
from ..upcycle import upcycle
from .families import VISION_TABLES, config_class, registered_class, registered_families
from .findings import FIRST_WORD, NUM_EXPERTS, NUM_TOKENS, Finding, first_tokens, judged, one_line
from .measuring_vlms import measure_vlm
from .table import CONVERTED, NOT_MEASURED, OTHER, PARTS, REFUSED, SPARSE, check_known
from .tiny_configs import IMAGE_SIZE, VOCABULARY
from .tiny_parents import IMAGE, build_parent, save_parent, save_partner
from .tower_inputs import CallForm, call_form

EVERY_LAYER = {"output_hidden_states": True}
# By any of these names a configuration says how many layers and heads of one width it has, and how it cuts images.
DEPTHS = ("num_hidden_layers", "depth", "num_layers", "n_layers")
HEADS = ("num_attention_heads", "num_heads", "n_heads")
PATCHES = ("patch_size", "tubelet_size")


def other_models(config: PreTrainedConfig) -> list[str]:
    """The models that a configuration is put together from; empty for a model of its own."""
    parts = {name: getattr(config, name, None) for name in config.sub_configs or {}}
    types = {name: getattr(part, "model_type", "") for name, part in parts.items()}
    return [f"{name} ({model_type})" for name, model_type in types.items() if model_type]


def not_a_backbone(config: PreTrainedConfig, part: str) -> str:
    """Why a configuration, as its class makes it, is no decoder or ViT; empty where it may be one."""
    if others := other_models(config):
        return f"a model put together from {', '.join(others)}; give one of these"
    if part == "text":
        return "a decoder with an encoder (is_encoder_decoder)" if config.is_encoder_decoder else ""
    known = {**config.to_dict(), **{name: getattr(config, name, None) for name in config.attribute_map}}
    kinds = {"layers": DEPTHS, "attention heads": HEADS}
    missing = [what for what, names in kinds.items() if not any(isinstance(known.get(name), int) for name in names)]
    missing += [] if any(name in known for name in PATCHES) else ["patches of one size"]
    return f"its configuration names no {' and no '.join(missing)}: not one stack of like layers" if missing else ""


@torch.no_grad()
def logits_of(model: Any, tokens: Tensor) -> Tensor:
    """The logits of tokens."""
    return model(input_ids=tokens).logits


def is_causal(model: Any, tokens: Tensor) -> bool:
    """Whether a token's logits do not depend on later ones."""
    changed = tokens.clone()
    changed[:, -1] = (changed[:, -1] + 1) % (VOCABULARY - FIRST_WORD) + FIRST_WORD
    before, after = (logits_of(model, ids)[:, :-1] for ids in (tokens, changed))
    return measure_gap(before, after) <= LIMIT


def layouts_of(tower: Any) -> str:
    """How the MLPs of a tower are written."""
    _, layers = tower_layers(tower)
    return "; ".join(dict.fromkeys(str(find_dense_mlp(tower, index).layout) for index in range(len(layers))))


@contextmanager
def quiet() -> Iterator[None]:
    """Without the host's remarks on every tiny model."""
    from transformers.utils.logging import disable_progress_bar, enable_progress_bar, is_progress_bar_enabled

    before, had_bars = transformers.logging.get_verbosity(), is_progress_bar_enabled()
    transformers.logging.set_verbosity_error()
    disable_progress_bar()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(before)
        if had_bars:
            enable_progress_bar()


def upcycled(family: str, part: str, parent: Any, folder: Path) -> Any:
    """The parent upcycled beside its partner, proved, and loaded as a user loads it.

    Raises:
        ValueError: as `upcycle`.
    """
    other = "vision" if part == "text" else "text"
    settings: dict[str, Any] = {
        f"{part}_model": str(save_parent(parent, part, folder / "parent")),
        f"{other}_model": str(save_partner(part, folder / "partner")),
        f"{part}_experts": NUM_EXPERTS,
        "output_dir": str(folder / "out"),
    }
    out = upcycle(UpcycleArguments(**settings))
    return AutoModelForImageTextToText.from_pretrained(out, dtype=torch.float32).eval()


def measure_text(family: str) -> Finding:
    """Measures a text family that may be a decoder."""
    parent: Any = build_parent(family, "text")
    tokens = first_tokens((2, NUM_TOKENS))
    wanted = logits_of(parent, tokens)
    if not is_causal(parent, tokens):
        return Finding(family, "text", OTHER, reason="its logits depend on later tokens: an encoder")
    with tempfile.TemporaryDirectory() as folder:
        try:
            layouts = layouts_of(parent.base_model)
            sparse = upcycled(family, "text", parent, Path(folder))
        except ValueError as error:
            return Finding(family, "text", REFUSED, reason=one_line(error, Path(folder)))
        gap = measure_gap(wanted, logits_of(sparse, tokens)[..., : wanted.shape[-1]])
    return judged(Finding(family, "text", CONVERTED, gap, layouts))


def tensors_of(outputs: Any) -> dict[str, Tensor]:
    """A tower's results by name."""
    found: dict[str, Tensor] = {}
    for name, value in outputs.items():
        many = value if isinstance(value, (tuple, list)) else (value,)
        found |= {f"{name}.{index}": one for index, one in enumerate(many) if isinstance(one, Tensor)}
    return {name: value for name, value in found.items() if value.is_floating_point() and value.numel() > 1}


def run_tower(tower: Any, inputs: dict[str, Any]) -> dict[str, Tensor]:
    """A tower's results; what it draws (ViT-MAE's masks) is drawn alike each time."""
    torch.manual_seed(0)
    with torch.no_grad():
        return tensors_of(tower(**inputs))


def is_constant(result: Tensor) -> bool:
    """Whether a result says nothing.

    Raises:
        ValueError: when it is no number.
    """
    if not result.isfinite().all():
        raise ValueError("its own results are not finite. Choose another family.")
    return not bool(result.std() > 0)


def widest_gap(wanted: dict[str, Tensor], got: dict[str, Tensor]) -> float:
    """The largest gap of a tower's results; what is a constant is left out."""
    return max(measure_gap(one, got[name]) for name, one in wanted.items() if not is_constant(one))


def tower_gap(tower: Any, inputs: dict[str, Tensor]) -> float:
    """The largest gap of a tower's results when it is made sparse in place, every layer of it."""
    wanted = run_tower(tower, inputs)
    _, layers = tower_layers(tower)
    make_sparse(tower, MoEConfig(num_experts=NUM_EXPERTS, layers=list(range(len(layers)))), copy=True)
    return widest_gap(wanted, run_tower(tower, inputs))


def measure_whole(family: str, form: CallForm, inputs: dict[str, Tensor]) -> tuple[float | None, str]:
    """The gap of what a tower gives inside a written vision-language model, or why there is none.

    The model answers to a picture too, through its own processor.
    """
    parent: Any = build_parent(family, "vision")
    wanted = run_tower(parent, inputs | EVERY_LAYER)
    with tempfile.TemporaryDirectory() as folder:
        try:
            sparse = upcycled(family, "vision", parent, Path(folder))
            processor = AutoProcessor.from_pretrained(Path(folder) / "out")
        except ValueError as error:
            return None, one_line(error, Path(folder))
    check_pictures(sparse, processor)
    return widest_gap(wanted, run_tower(sparse.model.vision_tower, inputs | EVERY_LAYER)), ""


@torch.no_grad()
def check_pictures(model: Any, processor: Any) -> None:
    """Runs a model on pictures as its user would.

    Raises:
        ValueError: when its answer does not depend on the picture.
    """
    pictures = [Image.effect_noise((IMAGE_SIZE, IMAGE_SIZE), sigma).convert("RGB") for sigma in (20, 200)]
    answers = [
        model(**processor(text=f"w1 {IMAGE} w2", images=picture, return_tensors="pt")).logits for picture in pictures
    ]
    if not all(answer.isfinite().all() for answer in answers) or measure_gap(*answers) <= LIMIT:
        raise ValueError("The logits behind a picture do not depend on it. Choose another ViT.")


def measure_vision(family: str) -> Finding:
    """Measures a vision family that may be a ViT."""
    tower = build_parent(family, "vision")
    form = call_form(family, registered_class(family, VISION_TABLES))
    inputs = form.inputs(tower.config)
    run_tower(tower, inputs)
    try:
        layouts = layouts_of(tower)
        gap = tower_gap(tower, inputs)
    except ValueError as error:
        return Finding(family, "vision", REFUSED, reads=form.name, reason=one_line(error))
    whole, reason = measure_whole(family, form, inputs)
    kind = REFUSED if reason else CONVERTED
    return judged(Finding(family, "vision", kind, gap, layouts, form.name, whole, reason))


MEASURES = {"text": measure_text, "vision": measure_vision}


def check_names(names: list[str]) -> None:
    """Refuses what is no family of the installed transformers.

    Raises:
        ValueError: naming it.
    """
    check_known(names, {family for part in PARTS for family in registered_families(part)}, transformers.__version__)


def measure(family: str, part: str) -> Finding:
    """Classes one family of a part."""
    register()
    try:
        with quiet():
            config = config_class(family)()
    except (*BROKEN, StrictDataclassError) as error:
        return Finding(family, part, OTHER, reason=f"it cannot be made without another model: {one_line(error)}")
    if part == "vlm":
        with quiet():
            return measure_vlm(family, config)
    pieces = [getattr(config, name, None) for name in config.sub_configs or {}]
    inner = [piece for piece in pieces if piece is not None and not piece.model_type]
    declared = [name for one in (config, *inner) for name in sparse_fields(one)]
    if declared and not (part == "vision" and config.to_dict().get("num_experts") == 1):  # ViTPose's one is an MLP
        return Finding(family, part, SPARSE, reason=f"its configuration has {', '.join(declared)}")
    if reason := not_a_backbone(config, part):
        return Finding(family, part, OTHER, reason=reason)
    with quiet():
        try:
            return MEASURES[part](family)
        except (*BROKEN, ImportError, AssertionError, StrictDataclassError) as error:
            return Finding(family, part, NOT_MEASURED, reason=f"no tiny one could be run: {one_line(error)}")


def measure_all(names: list[str] | None = None) -> Iterator[Finding]:
    """Classes all families, or those named, one after the other."""
    for part in PARTS:
        for family in registered_families(part):
            if not names or family in names:
                yield measure(family, part)
