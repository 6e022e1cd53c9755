"""The classes of words, and the colours of experts."""

import pytest
import torch

from modeling_vlmoe.finetune.route.palette import COLOURS, channels, colour, contrast, ink, shade
from modeling_vlmoe.finetune.route.words import CLASSES, pieces, read_tokens
from tests import tiny

# Machado, Oliveira and Fernandes (2009), severity 1: linear RGB as others see it.
NORMAL = torch.eye(3)
PROTANOPIA = torch.tensor(
    [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]]
)
DEUTERANOPIA = torch.tensor(
    [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]]
)
TO_XYZ = torch.tensor(
    [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]]
)
WHITE = torch.tensor([0.95047, 1.0, 1.08883])


@pytest.fixture(scope="module")
def tokenizer():
    return tiny.tokenizer()


def kinds(tokenizer, text, contents):
    """Each word's class, white space left out."""
    tokens = read_tokens(tokenizer, tokenizer(text)["input_ids"], contents)
    assert "".join(token.text for token in tokens) == text
    words: list[tuple[str, str]] = []
    for token in tokens:
        assert token.kind in CLASSES
        if not token.text:
            continue
        if words and words[-1][1] == token.kind and not token.text.startswith(" "):
            words[-1] = (words[-1][0] + token.text, token.kind)
        else:
            words.append((token.text, token.kind))
    return [(text.strip(), kind) for text, kind in words if text.strip()]


def test_each_token_has_the_class_of_its_word(tokenizer):
    said = "What is 12 or Berlin, été?"
    found = kinds(tokenizer, f"<|im_start|>user\n{said}<|im_end|>\n", [said])
    assert found == [
        ("<|im_start|>", "special"),
        ("user", "template"),
        ("What", "function"),
        ("is", "function"),
        ("12", "digits"),
        ("or", "function"),
        ("Berlin", "capitalised"),
        (",", "punctuation"),
        ("été", "other"),
        ("?", "punctuation"),
        ("<|im_end|>", "special"),
    ]


def test_a_character_of_several_tokens_is_shown_once(tokenizer):
    ids = tokenizer("漢字 ok")["input_ids"]
    shown = pieces(tokenizer, ids)
    assert "".join(shown) == "漢字 ok"
    assert shown[:3] == ["", "", "漢"]


def test_a_long_text_is_read_as_a_short_one(tokenizer):
    text = "the red circle is at 12, été. " * 20
    assert "".join(pieces(tokenizer, tokenizer(text)["input_ids"])) == text


def test_a_template_that_changes_the_text_leaves_all_words_to_it(tokenizer):
    found = kinds(tokenizer, "THE RED CIRCLE", ["the red circle"])
    assert {kind for _, kind in found} == {"function", "capitalised"}


def lab(seen):
    """The palette in CIELAB, linear RGB seen through a matrix."""
    shares = torch.tensor([channels(code) for code in COLOURS]) / 255
    linear = torch.where(shares <= 0.04045, shares / 12.92, ((shares + 0.055) / 1.055) ** 2.4)
    ratio = (linear @ seen.T).clamp(0, 1) @ TO_XYZ.T / WHITE
    root = torch.where(ratio > 0.008856, ratio.clamp(min=1e-9) ** (1 / 3), 7.787 * ratio + 16 / 116)
    return torch.stack([116 * root[:, 1] - 16, 500 * (root[:, 0] - root[:, 1]), 200 * (root[:, 1] - root[:, 2])], -1)


@pytest.mark.parametrize("seen", [NORMAL, PROTANOPIA, DEUTERANOPIA], ids=["normal", "protanopia", "deuteranopia"])
@pytest.mark.parametrize(("number", "least"), [(8, 14), (16, 14), (64, 7.5)])
def test_experts_have_colours_apart(seen, number, least):
    distances = torch.cdist(lab(seen)[:number], lab(seen)[:number]) + 1e3 * torch.eye(number)
    assert distances.min() > least


def test_text_can_be_read_on_every_colour():
    assert len(set(COLOURS)) == 64
    for code in [*COLOURS, colour(-1), *(shade(share / 10, 0.125) for share in range(11))]:
        assert contrast(ink(code), code) >= 4.5, code


def test_a_heat_map_is_white_at_nothing_and_darkest_at_four_times_the_even_share():
    assert shade(0, 0.25) == "#ffffff"
    assert shade(1, 0.25) == shade(1, 0.125) == "#08306b"
