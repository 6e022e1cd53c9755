"""A tiny vlmoe model on disk, a few pictures with questions, and arguments for runs of seconds."""

import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from modeling_vlmoe.finetune.arguments import parse_settings
from tests import models
from tests.finetune.questions import question, write_rows

COLOURS = {"red": (220, 20, 20), "green": (20, 200, 20), "blue": (20, 20, 220), "white": (250, 250, 250)}
DENSE = {"text_moe": None, "vision_moe": None, "connector_moe": None}


def save_model(folder, **fields):
    """A model with a processor, and a receipt as the conversion leaves one."""
    processor = models.processor()
    model = models.sparse_model(image_token_id=processor.image_token_id, **fields)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    (folder / "upcycle_receipt.json").write_text('{"seed": 0}')
    return folder


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    """All three parts sparse."""
    return save_model(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="session")
def dense_base(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("dense"), **DENSE)


@pytest.fixture(scope="session")
def delta_base(tmp_path_factory):
    """All three parts with delta experts."""
    delta = models.EXPERTS | {"expert_type": "delta", "expert_rank": 2}
    return save_model(tmp_path_factory.mktemp("delta"), **dict.fromkeys(DENSE, delta))


@pytest.fixture
def model(base):
    return AutoModelForImageTextToText.from_pretrained(base)


@pytest.fixture(scope="session")
def processor(base):
    return AutoProcessor.from_pretrained(base)


@pytest.fixture(scope="session")
def pictures(tmp_path_factory):
    """A folder with one picture per colour and rows over them: six of one image, one of two, one of none."""
    folder = tmp_path_factory.mktemp("pictures")
    (folder / "images").mkdir()
    for name, colour in COLOURS.items():
        Image.new("RGB", (24, 24), colour).save(folder / "images" / f"{name}.png")
    single = [question([f"images/{name}.png"], name) for name in COLOURS]
    again = [question([f"images/{name}.png"], name, "say the colour", "other") for name in ("red", "green")]
    both = question(["images/red.png", "images/blue.png"], "red and blue", "which two?", "pair")
    text_only = question([], "four", "two and two?", "text")
    write_rows(folder / "train.jsonl", [*single, *again, both, text_only])
    write_rows(folder / "test.jsonl", single)
    return folder


@pytest.fixture
def arguments(base, pictures, tmp_path):
    """Builds the arguments of a run of two steps; keywords override."""

    def build(**given):
        values = {
            "method": "lora",
            "model": str(base),
            "data": str(pictures / "test.jsonl"),
            "output_dir": str(tmp_path / "out"),
            "max_steps": 2,
            "per_device_train_batch_size": 4,
            "learning_rate": 1e-2,
            "lora_r": 4,
            "logging_steps": 1,
            "report_to": "none",
            "use_cpu": True,
            "disable_tqdm": True,
        }
        return parse_settings(values | given)

    return build
