"""How far tasks are routed apart, in bits, and how images are moved and rows collated."""

import math

import pytest
import torch

from modeling_vlmoe.finetune.classifier.arguments import ClassifyArguments
from modeling_vlmoe.finetune.classifier.batches import ClassificationCollator, RowReader, move_images
from modeling_vlmoe.finetune.classifier.data import load_data
from modeling_vlmoe.finetune.classifier.digits import write_digits
from modeling_vlmoe.finetune.classifier.models import MEAN, STD, build_processor
from modeling_vlmoe.finetune.classifier.routing import divergence_bits


@pytest.mark.parametrize(
    ("shares", "bits"),
    [
        ([[0.5, 0.5], [0.5, 0.5]], 0.0),
        ([[1.0, 0.0], [0.0, 1.0]], 1.0),
        ([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]], math.log2(3)),
        ([[1.0, 0.0], [0.5, 0.5]], 0.311278),  # H(3/4) - 1/2
    ],
)
def test_divergence_is_what_an_assignment_tells_of_the_task(shares, bits):
    assert divergence_bits(torch.tensor(shares, dtype=torch.float64)) == pytest.approx(bits, abs=1e-6)


def test_images_that_are_not_moved_stay():
    pixels = torch.randn(3, 3, 8, 8)
    torch.testing.assert_close(move_images(pixels, 0.0, 0.0), pixels, rtol=0, atol=1e-5)


def test_images_move_at_most_as_far_as_they_may():
    dot = torch.zeros(64, 1, 9, 9)
    dot[:, :, 4, 4] = 1.0
    moved = move_images(dot, 1 / 9, 0.0)
    assert (moved != dot).flatten(1).any(1).all()
    assert moved[:, :, 2:7, 2:7].sum((1, 2, 3)).allclose(torch.ones(64), atol=1e-4)  # one pixel, and no further
    centre = moved.flatten(2).argmax(-1)[:, 0]
    assert ((centre // 9 - 4).abs() <= 1).all()
    assert ((centre % 9 - 4).abs() <= 1).all()


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    folder = write_digits(tmp_path_factory.mktemp("digits"), 80)
    data = load_data(folder, "What?", 0.25)
    return data, build_processor(ClassifyArguments(output_dir="out", image_size=8, patch_size=2), data)


def test_a_batch_is_what_the_processor_gives(digits):
    """Rows are read one by one, kept and padded; the processor given all at once is the oracle."""
    data, processor = digits
    rows = data.train[:7]
    collate = ClassificationCollator(RowReader(processor), data.labels)
    chats = []
    for row in rows:
        content = [{"type": "image", "path": row.image}, {"type": "text", "text": row.text}]
        chats.append([{"role": "user", "content": content}])
    wanted = processor.apply_chat_template(
        chats,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"padding": True, "padding_side": "right"},
    )
    for _ in range(2):  # read, then kept
        batch = collate(rows)
        assert [data.labels[index] for index in batch.pop("labels")] == [row.label for row in rows]
        assert set(batch) == set(wanted)
        for name, value in batch.items():
            torch.testing.assert_close(value, wanted[name], rtol=0, atol=0)


def test_images_are_normalised_as_the_source_documents_say(digits):
    data, processor = digits
    pixels = ClassificationCollator(RowReader(processor), data.labels)(data.train[:16])["pixel_values"]
    raw = pixels * torch.tensor(STD).view(3, 1, 1) + torch.tensor(MEAN).view(3, 1, 1)
    assert raw.min().item() == pytest.approx(0.0, abs=1e-5)
    assert raw.max().item() == pytest.approx(1.0, abs=1e-5)
