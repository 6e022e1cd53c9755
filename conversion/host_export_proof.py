"""The proof of an export of a host's VLM that is sparse in place: both models are given what the written processor
makes of a picture and a text, and of a video where it reads one here.

Beside what `export_proof` asks: is every other field of the configuration the dense VLM's, and every file of the
processor the same, byte for byte?
"""

from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from modeling_vlmoe.parts import find_towers
from modeling_vlmoe.towers import tower_layers

from .block_probes import BlockProbe
from .export_meaning import carried_meaning, check_experts, compare, text_meaning
from .export_proof import LOGITS, NUM_TOKENS, ExportProof, run_proof
from .gaps import Findings
from .host_export import HostExportPlan
from .host_inputs import Inputs, check_copied, host_inputs, open_written
from .host_proof import accepted, host_logits, source_logits, written_logits
from .host_targets import HOST_PAIRS, dense_values, is_tied, text_part, text_place
from .mapped_maths import mapped_maths
from .native_arguments import TEXT
from .native_targets import declared_fields, from_native
from .probes import all_of


class HostExportProof(ExportProof):
    """One proof of one written folder."""

    plan: HostExportPlan

    def _probes(self) -> list[BlockProbe]:
        if self.plan.pair is None:
            return []
        where, tower = find_towers(self.vlmoe)["text"]
        theirs = self.native.base_model if self.plan.args.to == TEXT else find_towers(self.native)["text"][1]
        path, layers = tower_layers(tower)
        return self._block_probes(f"{where}.{path}", layers, tower_layers(theirs)[1])

    def given(self) -> dict[str, Inputs]:
        """What both models are run on, by what it is.

        Raises:
            ProofError: when the processor that was written is not the checkpoint's.
        """
        vocabulary = self.vlmoe.get_input_embeddings().weight.shape[0]
        tokens = torch.randint(vocabulary, (1, 2 * NUM_TOKENS), generator=self._generator("text"))
        special = {value for name, value in vars(self.vlmoe.config).items() if "token" in name and type(value) is int}
        plain = next(token for token in range(vocabulary) if token not in special)
        tokens[torch.isin(tokens, torch.tensor(sorted(special), dtype=torch.long))] = plain
        plain_text = {"text": {"input_ids": tokens, "use_cache": False}}
        if self.plan.args.to == TEXT:
            return plain_text
        check_copied(self.plan.source.folder, self.folder)
        written = open_written(self.folder, self.plan.source.given, self.plan.native.model_type)
        found, not_made = host_inputs(written, self.plan.config, self.plan.source.given, self.plan.drawing.seed)
        self.plan.not_read = self.plan.not_read or not_made  # the receipt and the command say so
        return found | plain_text

    def run(self) -> None:
        everything, wanted = self.given(), {}
        for number, (what, inputs) in enumerate(everything.items()):
            probes = [] if number else self._probes()  # what is first reads images and text
            with mapped_maths(), all_of([probe.noting() for probe in probes]):
                wanted[what] = source_logits(self.vlmoe, inputs, what, self.plan.source.given)
            with mapped_maths(), all_of([probe.comparing() for probe in probes]):
                got = written_logits(self.native, inputs, what)
            self.findings.judge(f"{LOGITS} of {what}", wanted[what], got, cache(partial(self.moved, inputs)))
        check_host_meaning(self.plan, self.config)
        what = next(iter(everything))
        self.report_bfloat16(in_bfloat16(accepted(self.native, everything[what])), wanted[what])

    def moved(self, inputs: Inputs) -> Tensor:
        """The checkpoint's logits of inputs that are moved by their last bit."""
        with mapped_maths():
            return host_logits(self.vlmoe, inputs, self._generator("nudge"))


def in_bfloat16(inputs: Inputs) -> Inputs:
    """Inputs with their pixels in bfloat16, as a model in that dtype is given them."""
    return {
        name: value.to(torch.bfloat16) if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in inputs.items()
    }


def check_host_meaning(plan: HostExportPlan, written: Any) -> None:
    """Compares a written configuration, read back, with the checkpoint's, field by field.

    Args:
        plan: What was to be written.
        written: What was.

    Raises:
        ProofError: naming the field that differs.
    """
    part, native = text_part(plan.config), written.get_text_config()
    dense, moe = (native, None) if plan.pair is None else from_native(native, HOST_PAIRS)
    compare("LLM", carried_meaning(plan.pair, part.text_config), text_meaning(dense))
    compare("whole", {"tie": part.tie_word_embeddings}, {"tie": is_tied(written)})
    if moe is not None:
        check_experts(plan, moe)
    if plan.args.to == TEXT:
        return
    config, text = plan.config.dense_class.from_dict(dense_values(plan.config)), text_place(plan.config)
    inner = {name for name in config.sub_configs if getattr(config, name, None) is not None}
    compare("whole", without(config, inner), without(written, inner))
    for name in inner - {text}:
        compare(name, without(getattr(config, name)), without(getattr(written, name)))


def without(config: PreTrainedConfig, names: set[str] | frozenset[str] = frozenset()) -> dict[str, Any]:
    """What a configuration's class declares, without these fields."""
    return {name: value for name, value in declared_fields(config).items() if name not in names}


@torch.no_grad()
def prove_host_export(plan: HostExportPlan, folder: Path) -> Findings:
    """Proves that the files in `folder` compute what the plan's checkpoint computes; see `export_proof.prove_export`.

    Raises:
        ProofError: naming the tensor, the layer, or the result that differs.
    """
    return run_proof(HostExportProof, plan, folder)
