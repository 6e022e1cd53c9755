"""Writing what a plan says, proved before the folder gets its name: the end of `upcycle` and of `import_native`."""

import errno
import hashlib
import logging
import shutil
from pathlib import Path

from transformers.dynamic_module_utils import custom_object_save

from modeling_vlmoe.companions import HISTORY_NAME
from modeling_vlmoe.model_cards import write_card
from modeling_vlmoe.weight_fingerprint import fingerprint

from .meta_models import build_vlm
from .output_folder import check_space, whole_or_nothing
from .plans import UpcyclePlan
from .receipt import build_receipt, write_receipt
from .streaming import write_checkpoint
from .summaries import format_bytes
from .verify import prove

logger = logging.getLogger(__name__)


def write_companions(plan: UpcyclePlan, folder: Path) -> None:
    """Writes what a checkpoint holds beside its weights: configurations, processor, the model's code, and the
    trainings that a dense vlmoe parent has been through.
    """
    plan.config.save_pretrained(folder)
    plan.generation.save_pretrained(folder)
    plan.write_processor(folder)
    custom_object_save(build_vlm(plan.config), folder)
    for parent in plan.parents.values():
        if parent.role == "vlm" and (parent.folder / HISTORY_NAME).is_file():
            shutil.copyfile(parent.folder / HISTORY_NAME, folder / HISTORY_NAME)


def write_scales(plan: UpcyclePlan, scales: dict[str, list[float]], folder: Path) -> None:
    """Writes the scales that were measured into the configuration."""
    for part, factors in scales.items():
        plan.config.moe(part).routed_scaling_factor = factors
    if scales:
        plan.config.save_pretrained(folder)


def write_proved(plan: UpcyclePlan, output: Path, force: bool) -> Path:
    """Writes what a plan says, proves it, and moves it into place.

    Raises:
        ValueError: for whatever the user can mend.
        ProofError: a ValueError, when the result does not compute what the parents compute.
        OSError: when the disk is full.
    """
    check_space(output, plan.mapping.num_bytes)
    logger.info("Writing %s into %s.", format_bytes(plan.mapping.num_bytes), output)
    with whole_or_nothing(output, force) as folder:
        try:
            file_hashes = write_checkpoint(folder, plan.mapping.specs, plan.mapping.blocks(plan.drawing))
            write_companions(plan, folder)
        except OSError as error:
            if error.errno == errno.ENOSPC:
                raise OSError(
                    errno.ENOSPC, f"The disk is full; {output} needs about {format_bytes(plan.mapping.num_bytes)}"
                ) from error
            raise
        logger.info("Running the written files against the parents.")
        gaps = prove(plan, folder, reads_all=False)
        write_scales(plan, gaps.scales, folder)
        small = [file for file in sorted(folder.iterdir()) if file.is_file() and file.name not in file_hashes]
        file_hashes |= {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in small}
        write_receipt(folder, build_receipt(plan, gaps, dict(sorted(file_hashes.items())), fingerprint(folder)))
        write_card(folder, name=output.resolve().name)  # of the receipt, so its hash is not in it
    return output
