"""Receipt, history and card come along on every way that a model can take from one folder to another."""

import copy
import pickle

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModel,
    AutoModelForImageTextToText,
    AutoModelForSequenceClassification,
    AutoProcessor,
    Trainer,
    TrainingArguments,
)

from modeling_vlmoe.companions import CARRIED, HOST_CARD, read_companions, replace_host_card, write_companions
from tests.models import batch, processor, sparse_model

TEXTS = {
    "upcycle_receipt.json": '{"seed": 7}',
    "training_history.json": '[{"method": "align"}]',
    "README.md": "---\nlicense: mit\n---\n\n# Ünique\n",
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    proc = processor()
    sparse_model(image_token_id=proc.image_token_id).save_pretrained(folder)
    proc.save_pretrained(folder)
    for name, text in TEXTS.items():
        (folder / name).write_text(text, encoding="utf-8")
    return folder


def companions(folder):
    return {name: (folder / name).read_text(encoding="utf-8") for name in CARRIED if (folder / name).exists()}


@pytest.mark.parametrize("auto_class", [AutoModelForImageTextToText, AutoModel, AutoModelForSequenceClassification])
def test_they_survive_loading_and_saving(saved, tmp_path, auto_class):
    auto_class.from_pretrained(saved).save_pretrained(tmp_path)
    assert companions(tmp_path) == TEXTS


def test_they_survive_copies_and_pickles(saved, tmp_path):
    model = AutoModelForImageTextToText.from_pretrained(saved)
    copy.deepcopy(model).save_pretrained(tmp_path / "copied")
    pickle.loads(pickle.dumps(model)).save_pretrained(tmp_path / "pickled")
    assert companions(tmp_path / "copied") == companions(tmp_path / "pickled") == TEXTS


def test_they_come_with_the_loading_info(saved):
    model, info = AutoModelForImageTextToText.from_pretrained(saved, output_loading_info=True)
    assert model.companions == TEXTS
    assert not info["missing_keys"]


def test_they_survive_a_trainers_checkpoint(saved, tmp_path):
    model = AutoModelForImageTextToText.from_pretrained(saved)
    row = {name: value[0] for name, value in batch((0, 0)).items()}
    arguments = TrainingArguments(tmp_path, max_steps=1, save_steps=1, use_cpu=True, report_to=[], logging_steps=1)
    Trainer(model, arguments, train_dataset=[row | {"labels": row["input_ids"]}]).train()
    assert companions(tmp_path / "checkpoint-1") == TEXTS


def test_they_survive_merging(saved, tmp_path):
    config = LoraConfig(r=2, target_modules=r".*language_model.*q_proj", target_parameters=["mlp.experts.down_proj"])
    merged = get_peft_model(AutoModelForImageTextToText.from_pretrained(saved), config).merge_and_unload()
    merged.save_pretrained(tmp_path)
    assert companions(tmp_path) == TEXTS


def test_they_survive_remote_code(saved, tmp_path, run_without_package):
    run_without_package(
        "from transformers import AutoModelForImageTextToText\n"
        f"model = AutoModelForImageTextToText.from_pretrained({str(saved)!r}, trust_remote_code=True)\n"
        f"model.save_pretrained({str(tmp_path / 'again')!r})"
    )
    assert companions(tmp_path / "again") == TEXTS
    assert (tmp_path / "again" / "companions.py").exists()


def test_what_a_folder_has_is_left_alone(saved, tmp_path):
    (tmp_path / "upcycle_receipt.json").write_text("its own")
    AutoModelForImageTextToText.from_pretrained(saved).save_pretrained(tmp_path)
    assert companions(tmp_path) == TEXTS | {"upcycle_receipt.json": "its own"}


def test_a_model_without_them_writes_none(tmp_path):
    sparse_model().save_pretrained(tmp_path / "first")
    AutoModelForImageTextToText.from_pretrained(tmp_path / "first").save_pretrained(tmp_path / "second")
    assert companions(tmp_path / "second") == {}


def test_only_the_main_process_writes(saved, tmp_path):
    AutoModelForImageTextToText.from_pretrained(saved).save_pretrained(tmp_path, is_main_process=False)
    assert companions(tmp_path) == {}


def test_a_card_that_is_no_text_does_not_keep_a_model_from_loading(saved, tmp_path):
    model = AutoModelForImageTextToText.from_pretrained(saved)
    model.save_pretrained(tmp_path)
    (tmp_path / "README.md").write_bytes(b"\xff\xfe caf\xe9")
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path)
    torch.testing.assert_close(loaded.lm_head.weight, model.lm_head.weight)


def test_an_id_that_is_in_no_cache_has_none():
    assert read_companions("somebody/nothing") == {}


def test_only_the_hosts_blank_card_is_replaced(tmp_path):
    card = tmp_path / "README.md"
    card.write_text(f"---\ntags:\n- mine\n---\n{HOST_CARD}")
    replace_host_card(TEXTS, tmp_path)
    assert "# Ünique" in card.read_text(encoding="utf-8")
    assert "- mine" in card.read_text(encoding="utf-8")
    card.write_text("# Somebody's")
    replace_host_card(TEXTS, tmp_path)
    write_companions(TEXTS, tmp_path)
    assert card.read_text() == "# Somebody's"


def test_a_processor_saved_beside_leaves_them(saved, tmp_path):
    AutoModelForImageTextToText.from_pretrained(saved).save_pretrained(tmp_path)
    AutoProcessor.from_pretrained(saved).save_pretrained(tmp_path)
    assert companions(tmp_path) == TEXTS
