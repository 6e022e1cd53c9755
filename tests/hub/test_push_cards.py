"""Cards: a person's stays, here and on the Hub; what a library wrote is nobody's work, and ours takes its place."""

import pytest
from huggingface_hub import ModelCard, ModelCardData
from transformers.modelcard import TrainingSummary

from modeling_vlmoe.companions import HOST_CARD
from modeling_vlmoe.push_cards import is_librarys, is_persons
from tests.hub.folders import edit
from tests.hub_server import metadata_errors

THEIRS = b"---\nlicense: mit\n---\n# Mine\n"


def trl_card(template):
    utils = pytest.importorskip("trl.trainer.utils")
    return str(
        utils.generate_model_card(
            base_model="alice/tiny",
            model_name="tuned",
            hub_model_id="alice/tuned",
            dataset_name="bob/rows",
            tags=["sft", "trl"],
            wandb_url="https://wandb.ai/x",
            trackio_url=None,
            trainer_name="Online DPO",
            trainer_citation="@article{x,\n  title = {{X}}\n}",
            template_file=template,
            paper_title="X: Y",
            paper_id="1",
        )
    )


def trainer_card(**given):
    shown = {"learning_rate": 1e-3, "optimizer": "Use ADAMW with betas=(0.9,0.999)", "lr_scheduler_type": "linear"}
    values = {"model_name": "tuned", "finetuned_from": "/home/me/up", "hyperparameters": shown, "source": "trainer"}
    lines = [{"Training Loss": 1.0, "Epoch": 1.0, "Step": 2, "Validation Loss": 0.5}]
    return TrainingSummary(**(values | {"eval_results": {"Loss": 0.5}, "eval_lines": lines} | given)).to_model_card()


def host_card():
    described = f"This is the model card of a 🤗 transformers model that has been pushed on the Hub. {HOST_CARD}"
    data = ModelCardData(tags=["mine"], library_name="transformers")
    return str(ModelCard.from_template(data, model_description=described))


@pytest.fixture(scope="module")
def library_cards(tuned):
    return {
        "peft": (tuned / "README.md").read_text(),
        "trl": trl_card(None),
        "trl-reward": trl_card("rm_model_card.md"),
        "trainer": trainer_card(),
        "trainer-bare": trainer_card(finetuned_from=None, eval_results=None, eval_lines=None, dataset="rows"),
        "host": host_card(),
    }


@pytest.mark.parametrize("library", ["peft", "trl", "trl-reward", "trainer", "trainer-bare", "host"])
def test_a_librarys_card_is_nobodys_until_it_is_edited(library_cards, library):
    text = library_cards[library]
    assert is_librarys(text)
    assert not is_persons(text.replace("\n", "\r\n"))
    assert is_persons(f"{text}\nIt was trained on my own photographs.\n")
    assert is_persons(text.replace("---\n", "---\nextra_gated_prompt: mine\n", 1))
    blank = "[More Information Needed]" if "[More" in text else "More information needed"
    if blank in text:
        assert is_persons(text.replace(blank, "Mine", 1))


def test_peft_on_the_card_of_a_trainer_leaves_it_a_librarys(library_cards):
    assert is_librarys(f"{library_cards['trainer']}- PEFT 0.21.2\n")
    assert is_librarys(library_cards["trl"].replace("- TRL:", "- PEFT 0.21.2\n- TRL:"))


def test_an_edited_card_there_stays_and_it_is_said(hub, push_here, made, adapter):
    hub.write("alice/tiny", {"README.md": THEIRS})
    hub.write("alice/adapter", {"README.md": THEIRS})
    for folder, given in ((made, {}), (adapter, {"repo_id": "alice/adapter", "base_model": "alice/tiny"})):
        said = push_here(folder, **given)
        assert hub.files(given.get("repo_id", "alice/tiny"))["README.md"] == THEIRS
        assert "README.md: that of the repository has been edited, and stays" in said
    ours = (made / "README.md").read_text().replace("# made", "# My own words")
    (made / "README.md").write_text(ours)
    push_here(made)
    assert hub.files("alice/tiny")["README.md"].decode() == ours


def test_ours_takes_the_place_of_a_librarys_card(hub, push_here, made, library_cards):
    (made / "README.md").write_text(library_cards["trainer"])
    hub.write("alice/tiny", {"README.md": library_cards["host"].encode()})
    assert "stays" not in push_here(made)
    card = hub.files("alice/tiny")["README.md"].decode()
    assert "upcycle_receipt.json" in card
    assert "/home/me" not in card
    assert metadata_errors(card) == []


def test_a_classifier_is_not_said_to_answer(hub, push_here, made):
    edit(made / "config.json", architectures=["VLMoEForSequenceClassification"])
    push_here(made)
    card = ModelCard(hub.files("alice/tiny")["README.md"].decode())
    assert card.data.pipeline_tag != "image-text-to-text"
    assert "AutoModelForSequenceClassification" in card.text
