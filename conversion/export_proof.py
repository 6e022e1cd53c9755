"""The proof of an export: the files, read as transformers reads them, compute what the vlmoe checkpoint computes.

All maths in float32 on weights mapped from the files, the checkpoint's on one side, the written ones on the other:

- Do the files hold what they were to hold? Names, shapes, dtypes, bytes.
- Is each sparse block of the LM the same? Past the routers expert by expert, on random rows, and on the rows that the
  model really gives it.
- Are the image features, and the logits of text with a picture in it, the same?
- Does the processor give the same token ids and pixels?
- Does the configuration say the same, field by field, also what no run of some dozen tokens sees?

Then both are run in bfloat16, where the host's routers round and ours do not; that gap is reported, not judged.
"""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import CONFIG_NAME

from modeling_vlmoe.towers import tower_layers

from .block_probes import BlockProbe
from .dense_runs import image_results
from .dense_tensors import map_sparse
from .export_meaning import check_meaning
from .export_plan import ExportPlan
from .gaps import Findings, measure_gap, nudge
from .low_precision import mapped_bfloat16, to_bfloat16
from .mapped_maths import mapped_maths
from .meta_models import build_on_meta, fill_mapped
from .native_arguments import TEXT
from .native_mapping import LLAVA_NAMES
from .native_processor import check_processor, picture
from .native_tensors import AUTO_CLASSES, NativeTensors, fill_native, find_native_tensors
from .page_flow import PageFlow
from .parents import Parent
from .probes import all_of, hooked
from .seeding import tensor_generator
from .streaming import CheckpointReader
from .verify import one_thread
from .written_checkpoint import check_weights, load_written

NUM_TOKENS, NUM_FEATURES = 16, 8  # text before and behind a picture, and how much of it the LLM reads
CLAIM = "The exported model is not the vlmoe model"
LOGITS, FEATURES = "logits", "image features"


def noise_pixels(plan: ExportPlan) -> Tensor:
    """Pixel values of a picture of noise, (1, channels, height, width)."""
    height, width = plan.pixel_shape[-2:]
    return plan.processor.image_processor(picture((height, width), seed=0), return_tensors="pt")["pixel_values"]


def vlmoe_features(plan: ExportPlan, model: Any, pixels: Tensor) -> Tensor:
    """The checkpoint's image features, (1, tokens, text width)."""
    body, images = model.model, {"pixel_values": pixels}
    return image_results(body.vision_tower, body.connector, images, plan.config, layers=[])[FEATURES]


def native_features(model: Any, pixels: Tensor) -> Tensor:
    """LLaVA's image features, by its own code, (1, tokens, text width)."""
    return torch.stack(list(model.model.get_image_features(pixel_values=pixels).pooler_output))


class ExportProof:
    """One proof of one written folder.

    Args:
        plan: What was to be written.
        folder: What was written.

    Raises:
        ProofError: when the files do not hold what they were to hold.
    """

    def __init__(self, plan: ExportPlan, folder: Path):
        self.plan, self.folder = plan, folder
        reader = CheckpointReader(folder)
        check_weights(plan.mapping, plan.drawing, reader, set())
        config = load_written(AutoConfig, folder, CONFIG_NAME)
        self.config = config
        role = "text" if plan.args.to == TEXT else "vlm"
        self.tensors: NativeTensors = find_native_tensors(Parent(role, folder.name, folder, None, config, reader))
        self.native: Any = fill_native(self.tensors)
        self.vlmoe = map_sparse(plan.tensors)
        self.findings = Findings(claim=CLAIM)
        self.pages = PageFlow()
        self._let_go()

    def _let_go(self) -> None:
        """Lets go of each stack of experts when it has run: both models may be larger than the free memory."""
        sides = ((self.vlmoe, self.plan.tensors), (self.native, self.tensors))
        for model, tensors in sides:
            for path, module in model.named_modules():
                if path.endswith(".experts"):
                    names = [name for name in tensors.names if name.startswith(f"{path}.")]
                    keys = [key for name in names for key in getattr(tensors, "pieces", one_piece(tensors))(name)]
                    self.pages.let_go_after(module, [tensors.parent.reader.span(key) for key in keys])

    def _generator(self, name: str) -> torch.Generator:
        return tensor_generator(self.plan.drawing.seed, f"proof of {name}")

    def _probes(self) -> list[BlockProbe]:
        """One for each sparse layer of the written LM."""
        if self.plan.pair is None:
            return []
        path, ours = tower_layers(self.vlmoe.model.language_model)
        _, theirs = tower_layers(
            self.native.base_model if self.plan.args.to == TEXT else self.native.model.language_model
        )
        return self._block_probes(path, ours, theirs)

    def _block_probes(self, path: str, ours: nn.ModuleList, theirs: nn.ModuleList) -> list[BlockProbe]:
        """One for each of the layers that is sparse in the written LM."""
        seed, dtype = self.plan.drawing.seed, None
        return [
            BlockProbe(f"{path}.{index}.mlp", one.mlp, one.mlp, other.mlp, dtype, seed, self.findings)  # type: ignore[arg-type]
            for index, (one, other) in enumerate(zip(ours, theirs, strict=True))
            if hasattr(other.mlp, "experts")
        ]

    def run(self) -> None:
        """Proves what the form calls for.

        Raises:
            ProofError: naming what differs.
        """
        features = None
        if self.plan.args.to != TEXT:
            check_processor(self.plan.processor, self.folder)
            features = self.prove_images()
        self.prove_text(features)
        check_meaning(self.plan, self.config)

    def prove_images(self) -> Tensor:
        """Gives the written model's image features; those of experts' means are measured only."""
        pixels = noise_pixels(self.plan)
        with mapped_maths():
            wanted, got = vlmoe_features(self.plan, self.vlmoe, pixels), native_features(self.native, pixels)

        def nudged() -> Tensor:
            with mapped_maths():
                return vlmoe_features(self.plan, self.vlmoe, nudge(pixels, self._generator("image nudge")))

        if self.plan.is_exact:
            self.findings.judge(FEATURES, wanted, got, nudged)
            return got
        self.findings.informative[f"{FEATURES} by the mean of the experts, from those by the experts"] = measure_gap(
            wanted, got
        )
        return wanted  # so that the LM is judged by itself

    def inputs(self, features: Tensor | None) -> dict[str, Any]:
        """Random tokens, for LLaVA with the beginning of a picture in the middle."""
        vocabulary, token = self.plan.config.text_config.vocab_size, self.plan.config.image_token_id
        tokens = torch.randint(vocabulary, (1, 2 * NUM_TOKENS), generator=self._generator("text"))
        tokens[tokens == token] = 0 if token else 1
        if features is None:
            return {"input_ids": tokens, "use_cache": False}
        assert token is not None, "a processor has an image token"
        placeholders = torch.full((1, min(NUM_FEATURES, features.shape[1])), token)
        ids = torch.cat([tokens[:, :NUM_TOKENS], placeholders, tokens[:, NUM_TOKENS:]], dim=1)
        image = BaseModelOutputWithPooling(pooler_output=list(features[:, :NUM_FEATURES]))  # type: ignore[arg-type]
        return {"input_ids": ids, "mm_encoder_outputs": {"image": image}, "use_cache": False}

    def prove_text(self, features: Tensor | None) -> None:
        """The LM's blocks, and the logits."""
        inputs, probes = self.inputs(features), self._probes()
        with mapped_maths(), all_of([probe.noting() for probe in probes]):
            wanted = self.vlmoe(**inputs).logits
        with mapped_maths(), all_of([probe.comparing() for probe in probes]):
            got = self.native(**inputs).logits
        embedding = self.vlmoe.get_input_embeddings()

        @cache
        def nudged() -> Tensor:
            def change(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
                return nudge(output, self._generator("text nudge"))

            with mapped_maths(), hooked(embedding.register_forward_hook(change)):
                return self.vlmoe(**inputs).logits

        self.findings.judge(LOGITS, wanted, got, nudged)
        self.report_bfloat16(inputs, wanted)

    def report_bfloat16(self, inputs: dict[str, Any], wanted: Tensor) -> None:
        """How far both are from the float32 logits when all but our routers runs in bfloat16."""
        for name, model in (("vlmoe", self.vlmoe), ("exported", self.native)):
            with mapped_bfloat16():
                logits = to_bfloat16(model)(**inputs).logits.float()
            self.findings.informative[f"{LOGITS} in bfloat16, {name}, from those in float32"] = measure_gap(
                wanted, logits
            )


def one_piece(tensors: Any) -> Callable[[str], list[str]]:
    """What a vlmoe tensor is stored as."""
    return lambda name: [tensors.stored[name]]


def measure_mean(plan: ExportPlan) -> float:
    """How far the image features move when the mean of the experts is taken; nothing is written.

    Returns:
        In standard deviations of the checkpoint's.
    """
    native: Any = build_on_meta(lambda: AUTO_CLASSES["vlm"].from_config(plan.native))
    blocks = plan.mapping.blocks(plan.drawing)

    def made(prefix: str) -> Callable[[str], Tensor]:
        return lambda name: torch.cat(list(blocks(prefix + name)))

    fill_mapped(native.model.vision_tower, made(f"{LLAVA_NAMES.vision}"))
    fill_mapped(native.model.multi_modal_projector, made(f"{LLAVA_NAMES.connector}"))
    with one_thread(), torch.no_grad(), mapped_maths():
        pixels = noise_pixels(plan)
        return measure_gap(vlmoe_features(plan, map_sparse(plan.tensors), pixels), native_features(native, pixels))


@torch.no_grad()
def prove_export(plan: ExportPlan, folder: Path) -> Findings:
    """Proves that the files in `folder` compute what the plan's checkpoint computes.

    Args:
        plan: What was to be written.
        folder: What was written.

    Returns:
        Every measured gap.

    Raises:
        ProofError: naming the tensor, the layer, or the result that differs.
    """
    return run_proof(ExportProof, plan, folder)


def run_proof(kind: type[ExportProof], plan: ExportPlan, folder: Path) -> Findings:
    """Runs a proof of this kind; see `prove_export`."""
    with one_thread():
        proof = kind(plan, folder)
        try:
            proof.run()
        finally:
            proof.pages.close()
    return proof.findings
