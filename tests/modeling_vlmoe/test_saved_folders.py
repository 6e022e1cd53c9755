"""Every folder that is written holds the code that its `auto_map`s name, whoever writes it and whenever."""

import json
import re

import pytest
import transformers
from transformers import (
    AutoImageProcessor,
    AutoModel,
    AutoModelForSequenceClassification,
    AutoProcessor,
    AutoTokenizer,
)

from modeling_vlmoe import VLMoEForConditionalGeneration
from modeling_vlmoe.parts_config import AUTO_MAP
from tests import tiny
from tests.models import processor, sparse_model

PROCESSOR_MAP = {"AutoProcessor": "processing_vlmoe.VLMoEProcessor"}
# The files in which transformers looks for an auto_map.
NAMING = ("config.json", "processor_config.json", "tokenizer_config.json", "preprocessor_config.json")


def auto_map(folder, name):
    return json.loads((folder / name).read_text()).get("auto_map", {}) if (folder / name).is_file() else {}


def check_code(folder):
    """Every reference of the folder leads to a class in a file beside it, and that file's imports to files too."""
    maps = [auto_map(folder, name) for name in NAMING]
    references = {reference for one in maps for reference in one.values()}
    assert references, f"{folder} names no code"
    for reference in references:
        module, _, name = reference.rpartition(".")
        assert re.search(rf"\b{name}\b", (folder / f"{module}.py").read_text())
    for file in folder.glob("*.py"):
        for line in file.read_text().splitlines():
            if line.startswith("from ."):
                assert (folder / f"{line.split()[1][1:]}.py").is_file(), (file.name, line)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    proc = processor()
    sparse_model(image_token_id=proc.image_token_id).save_pretrained(folder)
    proc.save_pretrained(folder)
    return folder


def test_the_maps_name_every_auto_class(saved):
    assert auto_map(saved, "config.json") == AUTO_MAP
    assert auto_map(saved, "processor_config.json") == PROCESSOR_MAP
    assert {"AutoConfig", "AutoModel", "AutoModelForImageTextToText", "AutoModelForCausalLM"} <= set(AUTO_MAP)
    # Tokenizer and image processor are the parents' own classes, which need no code of ours.
    assert set(auto_map(saved, "tokenizer_config.json")) <= set(PROCESSOR_MAP)
    assert type(AutoTokenizer.from_pretrained(saved)) is type(tiny.tokenizer())
    assert type(AutoImageProcessor.from_pretrained(saved)) is type(tiny.image_processor("siglip"))


def by_saving(saved, folder):
    sparse_model().save_pretrained(folder)


def by_saving_in_shards(saved, folder):
    sparse_model().save_pretrained(folder, max_shard_size="50KB")


def by_saving_the_processor(saved, folder):
    processor().save_pretrained(folder)


def by_saving_again(saved, folder):
    VLMoEForConditionalGeneration.from_pretrained(saved).save_pretrained(folder)
    AutoProcessor.from_pretrained(saved).save_pretrained(folder)


def by_saving_the_body(saved, folder):
    AutoModel.from_pretrained(saved).save_pretrained(folder)


def by_saving_a_classifier(saved, folder):
    AutoModelForSequenceClassification.from_pretrained(saved, num_labels=3).save_pretrained(folder)


def by_the_trainer(saved, folder):
    arguments = transformers.TrainingArguments(folder, use_cpu=True, report_to=[])
    model, proc = VLMoEForConditionalGeneration.from_pretrained(saved), AutoProcessor.from_pretrained(saved)
    transformers.Trainer(model, arguments, processing_class=proc).save_model(folder)


def by_merging(saved, folder):
    from peft import LoraConfig, get_peft_model

    model = VLMoEForConditionalGeneration.from_pretrained(saved)
    tuned = get_peft_model(model, LoraConfig(r=2, target_modules=r".*language_model.*q_proj"))
    tuned.merge_and_unload().save_pretrained(folder)


WAYS = [
    by_saving,
    by_saving_in_shards,
    by_saving_the_processor,
    by_saving_again,
    by_saving_the_body,
    by_saving_a_classifier,
    by_the_trainer,
    by_merging,
]


@pytest.mark.parametrize("write", WAYS, ids=lambda write: write.__name__)
def test_a_written_folder_holds_all_code_that_it_names(saved, tmp_path, write):
    write(saved, tmp_path)
    check_code(tmp_path)
