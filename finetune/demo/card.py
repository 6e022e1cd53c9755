"""The card of the demo's tuned model: its evaluation beside all controls, and what no file knows, from the results."""

from pathlib import Path

from modeling_vlmoe.model_cards import CardNotes, write_card, write_notes

from ..evaluation_file import write_evaluation
from .report import ROWS
from .scenes import COLOURS, IMAGE_SIZE, PLACES, SHAPES
from .settings import DemoSettings
from .stages import DATA, TUNED, read_result

SPARSE = "sparse"


def demo_notes(root: Path, settings: DemoSettings) -> CardNotes:
    """What the card says beyond the files; its numbers are the settings' and the results'."""
    text, vision = (read_result(root, stage)["accuracy"] for stage in ("text", "vision"))
    return CardNotes(
        title="vlmoe-demo",
        description=(
            f"The model that `make demo` leaves in `demo-output/{TUNED}` (seed {settings.seed}). It shows the whole "
            "path at small size; it is of no use beyond that."
        ),
        parents=(
            f"Both are made by the demo: a Qwen3 of {settings.text_num_layers} layers, {settings.text_hidden_size} "
            f"wide, pretrained on scenes in words ({text:.3f} on held-out scenes), and a SigLIP ViT of "
            f"{settings.vision_num_layers} layers, {settings.vision_hidden_size} wide, pretrained on labels per patch "
            f"({vision:.3f} per cell)."
        ),
        data=(
            "Questions on rendered scenes of one or two coloured shapes; for the connector alone, captions and "
            "questions. The questions of the evaluation are on scenes that no training step saw."
        ),
        intended_use="Looking at how the parts of the package fit together.",
        bias="No people, text or natural images appear in its data, and nothing about bias can be learnt from it.",
        limits=(
            f"It knows {len(COLOURS)} colours, {len(SHAPES)} shapes and {len(PLACES)} places, one sentence form per "
            f"question, and {IMAGE_SIZE} x {IMAGE_SIZE} pixels."
        ),
    )


def write_demo_card(root: Path, settings: DemoSettings) -> None:
    """Writes the tuned model's evaluation beside all its controls, its notes, and the card of both."""
    folder = root / TUNED
    controls = {name: read_result(root, stage)[key] for name, (stage, key) in ROWS.items() if name != SPARSE}
    test = str(root / DATA / "test.jsonl")
    write_evaluation(folder, read_result(root, SPARSE)["accuracy"], controls, data=test)
    write_notes(folder, demo_notes(root, settings))
    write_card(folder, replace=True)
