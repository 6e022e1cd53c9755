"""The table of backbones: it is what is measured, nothing is left out of it, and its page is rendered from it."""

from pathlib import Path

import pytest
import transformers
from typer.testing import CliRunner

from modeling_vlmoe.cli import app
from modeling_vlmoe.conversion.backbones.families import registered_families, registered_names
from modeling_vlmoe.conversion.backbones.measuring import measure
from modeling_vlmoe.conversion.backbones.table import (
    CONVERTED,
    KINDS,
    NOT_MEASURED,
    PARTS,
    count_kinds,
    read_table,
    render_page,
    select,
    write_table,
)
from modeling_vlmoe.conversion.gaps import FLOOR_FACTOR, LIMIT

PAGE = Path(__file__).parents[2] / "docs" / "backbones.md"
README = PAGE.parents[1] / "README.md"
TABLE = read_table()
ROWS = {(row["part"], row["family"]): row for row in TABLE["findings"]}
# One of each kind, and of what is unusual; the slow run measures all.
SAMPLE = [
    ("text", "gpt2"),
    ("text", "bitnet"),
    ("text", "hyperclovax"),
    ("text", "modernbert-decoder"),
    ("text", "bert"),
    ("text", "mixtral"),
    ("vision", "dinov2"),
    ("vision", "qwen2_5_vl_vision"),
    ("vision", "siglip2_vision_model"),
    ("vision", "resnet"),
    ("vision", "sam_vision_model"),
    ("vision", "radio"),
    ("vision", "idefics3_vision"),
    ("vision", "vit_mae"),
    ("vision", "yolos"),
    ("text", "doge"),
    ("vlm", "qwen2_5_vl"),
    ("vlm", "internvl"),
    ("vlm", "idefics"),
    ("vlm", "instructblip"),
    ("vlm", "kosmos-2"),
    ("vlm", "molmo2"),
    ("vlm", "t5gemma2"),
    ("vlm", "llama4"),
]
# Registered for images, and no ViT: models of images and text, and models of tokens that images were made of.
NO_VISION = {"clip", "metaclip_2", "siglip", "siglip2", "tipsv2", "shieldgemma2", "imagegpt", "perceiver"}
needs_measured_version = pytest.mark.skipif(
    transformers.__version__ != TABLE["transformers"], reason="the table is of another transformers"
)


def is_within(gap, floor):
    return gap <= max(LIMIT, FLOOR_FACTOR * (floor or 0))


def test_the_page_is_rendered_from_the_table():
    assert PAGE.read_text(encoding="utf-8") == render_page(TABLE), (
        "docs/backbones.md is stale: run `vlmoe backbones --measure --write docs/backbones.md`"
    )


def test_the_readme_counts_them():
    counts = count_kinds(TABLE["findings"])
    said = f"{counts['text'][CONVERTED]} LLMs and {counts['vision'][CONVERTED]} ViTs"
    for one in (said, f"{counts['vlm'][CONVERTED]} VLMs are converted"):
        assert one in README.read_text(encoding="utf-8"), f"README.md should say: {one}"


def test_enough_families_are_converted_and_the_others_have_a_reason():
    counts = count_kinds(TABLE["findings"])
    assert counts["text"][CONVERTED] >= 60
    assert counts["vision"][CONVERTED] >= 45
    assert counts["vlm"][CONVERTED] >= 60
    for row in TABLE["findings"]:
        assert row["kind"] in KINDS
        assert is_within(row["gap"], row.get("floor")) if row["kind"] == CONVERTED else row["reason"], row
    for row in select(TABLE["findings"], "vision", CONVERTED):
        assert row["whole"] <= LIMIT, row


def test_every_converted_vlm_gave_the_dense_logits_of_an_image():
    for row in select(TABLE["findings"], "vlm", CONVERTED):
        assert row["reads"], row
        assert is_within(row["image_gap"], row.get("image_floor")), row


@needs_measured_version
def test_nothing_that_reads_images_alone_is_left_out():
    assert "exaone4_5_vision" in registered_families("vision")
    left_out = set(registered_names(("MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING", "MODEL_FOR_BACKBONE_MAPPING")))
    assert left_out - set(registered_families("vision")) == NO_VISION


@needs_measured_version
@pytest.mark.parametrize("part", PARTS)
def test_no_registered_family_is_left_out(part):
    assert sorted(family for one, family in ROWS if one == part) == sorted(registered_families(part))


def check_row(part, family):
    wanted = ROWS[part, family]
    if wanted["kind"] == NOT_MEASURED:
        pytest.skip("what it needs may be here")
    found = measure(family, part)
    assert found.kind == wanted["kind"], found.reason
    assert found.layouts == wanted.get("layouts", "")
    assert (found.whole is None) == ("whole" not in wanted), found.reason
    assert found.reads == wanted.get("reads", "")
    assert (found.image_gap is None) == ("image_gap" not in wanted), found.reason


@needs_measured_version
@pytest.mark.parametrize(("part", "family"), SAMPLE)
def test_a_family_is_as_the_table_says(part, family):
    check_row(part, family)


@pytest.mark.slow
@needs_measured_version
@pytest.mark.parametrize(("part", "family"), ROWS)
def test_every_family_is_as_the_table_says(part, family):
    check_row(part, family)


def test_the_command_prints_the_table():
    done = CliRunner().invoke(app, ["backbones"])
    assert done.exit_code == 0
    assert all(row["family"] in done.stdout for row in TABLE["findings"])


def test_the_command_says_more_about_a_family():
    done = CliRunner().invoke(app, ["backbones", "gpt2", "mamba"])
    assert "gpt2 (text): converted" in done.stdout
    assert "mamba (text): refused" in done.stdout
    assert "layers.0 has no MLP that matches" in done.stdout


def test_the_command_says_what_was_not_measured_and_why():
    done = CliRunner().invoke(app, ["backbones", "gemma3n"])
    assert "gemma3n (vlm): not measured\n  needs timm, which was not installed\n" in done.stdout


def test_the_command_says_how_a_vlm_was_given_an_image():
    done = CliRunner().invoke(app, ["backbones", "qwen2_5_vl"])
    assert "with an image, given as packed patches: gap " in done.stdout


def test_the_command_measures_a_family_again():
    done = CliRunner().invoke(app, ["backbones", "mamba", "--measure"])
    assert done.stdout.startswith("mamba (text): refused")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["no-such"], "has no text, vision or VLM family no-such"),
        (["no-such", "--measure"], "has no text, vision or VLM family no-such"),
        (["--write", "page.md"], "give it with --measure"),
        (["gpt2", "--measure", "--write", "page.md"], "name no family"),
    ],
)
def test_raises_when_it_is_asked_for_what_is_not_there(words, message):
    with pytest.raises(ValueError, match=message):
        CliRunner().invoke(app, ["backbones", *words], catch_exceptions=False)


def test_a_table_comes_back_as_it_was_written(tmp_path):
    write_table(TABLE["transformers"], TABLE["findings"], tmp_path / "table.json")
    assert read_table() == TABLE
    assert (tmp_path / "table.json").read_text(encoding="utf-8").count("\n") == len(TABLE["findings"]) + 2
