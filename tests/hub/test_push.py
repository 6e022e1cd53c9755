"""What is pushed is pulled whole: by branch, by commit, with the right token only, without the package too."""

import json

import pytest
import torch
from huggingface_hub import ModelCard, constants
from transformers import AutoModelForImageTextToText, AutoProcessor

from tests.hub.pulled import LOAD, LOAD_AND_SAVE, LOAD_PROCESSOR, PUSH_ADAPTER_FROM_PYTHON, PUSH_FROM_PYTHON, REFUSED
from tests.hub_server import TOKENS, metadata_errors
from tests.models import batch

TREE = {"config.json", "generation_config.json", "model.safetensors", "modeling_vlmoe.py", "companions.py"}
TREE |= {"processor_config.json", "tokenizer.json", "upcycle_receipt.json", "README.md"}


@pytest.fixture(scope="session")
def expected(converted, tmp_path_factory):
    """Inputs, and the logits that the converted model gives for them."""
    model = AutoModelForImageTextToText.from_pretrained(converted)
    inputs = batch()
    inputs["input_ids"] = inputs["input_ids"].masked_fill(inputs["input_ids"] == 300, model.config.image_token_id)
    with torch.no_grad():
        logits = model(**inputs).logits
    path = tmp_path_factory.mktemp("expected") / "expected.pt"
    torch.save({"inputs": inputs, "logits": logits}, path)
    return path


@pytest.fixture
def pull(hub, run_python):
    """Loads a repository in a process that cannot import the package, with empty caches."""

    def load(name, expected, *more, token=None, code=LOAD, home="puller", revisions=("main",)):
        words = [name, expected, json.dumps(revisions), *more]
        return run_python(code, hub.env(token), without_package=True, home=home, arguments=words)

    return load


def test_a_pushed_model_is_pulled_by_a_stranger(hub, vlmoe, pull, made, expected):
    (made / "runs").mkdir()
    (made / "runs" / "events.out").write_text("x")
    (made / "checkpoint-2").mkdir()
    for name in ("checkpoint-2/model.safetensors", "optimizer.pt", "training_args.bin"):
        (made / name).write_text("x")
    (made / "finetune_settings.yaml").write_text("method: align\n")
    said = vlmoe("push", made, "--repo-id", "alice/tiny", "--commit-message", "hello", env=hub.env())
    assert f"went to {hub.endpoint}/alice/tiny/commit/" in said
    assert "left out: checkpoint-2/, finetune_settings.yaml, optimizer.pt, runs/, training_args.bin" in said
    files = hub.files("alice/tiny")
    assert set(files) >= TREE
    assert not any(name.startswith(("runs", "checkpoint-2", "optimizer", "training_args")) for name in files)
    assert hub.repos["alice/tiny"].titles[-1] == "hello"
    assert b'name = "alice/tiny"' in files["README.md"]
    assert metadata_errors(files["README.md"].decode()) == []
    assert pull("alice/tiny", expected).startswith("transformers_modules")


def test_a_dry_run_sends_nothing(hub, push_here, made):
    said = push_here(made, dry_run=True)
    assert "would go to alice/tiny" in said
    assert "model.safetensors" in said
    assert hub.requests == []


@pytest.mark.slow
def test_a_branch_is_made_and_pulled_by_name_and_by_commit(hub, push_here, pull, made, expected):
    push_here(made, revision="next")
    assert not hub.files("alice/tiny")
    branches = hub.repos["alice/tiny"].branches
    branches["kept"] = commit = branches["next"]
    hub.repos["alice/tiny"].commit("next", {}, "emptied")
    pull("alice/tiny", expected, revisions=[commit, "kept"])


def test_a_private_repository_wants_the_right_token(hub, push_here, pull, made, expected):
    push_here(made, "alice/secret", private=True)
    assert hub.repos["alice/secret"].is_private
    pull("alice/secret", expected, "", TOKENS["bob"], "hf_x", token=TOKENS["alice"], code=LOAD + REFUSED)


def test_errors_of_the_hub_are_one_line(hub, vlmoe, push_here, made, monkeypatch):
    missing = vlmoe("push", made, "--repo-id", "alice/tiny", env=hub.env(None), fails=True)
    assert missing.startswith("vlmoe: The Hub refuses the push to alice/tiny (401: ")
    assert "Log in by `hf auth login`, set HF_TOKEN, or give --token." in missing
    with pytest.raises(ValueError, match=r"\(403: "):
        push_here(made, token=TOKENS["bob"])
    hub.is_broken = True
    broken = r"^The push to alice/tiny failed \(503: Service unavailable\). Try again later.$"
    with pytest.raises(ConnectionError, match=broken):
        push_here(made)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(ConnectionError, match=r"^The Hub at http://127.0.0.1:9 cannot be reached: .*$"):
        push_here(made)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=r"^HF_HUB_OFFLINE keeps this process from the Hub; unset it to push.$"):
        push_here(made)


def test_a_public_repository_is_not_taken_for_a_private_one(hub, push_here, made):
    hub.write("alice/tiny", {"a.txt": b"a"})
    with pytest.raises(ValueError, match="alice/tiny is there already and public"):
        push_here(made, private=True)
    assert set(hub.files("alice/tiny")) == {"a.txt"}


@pytest.mark.slow
def test_a_stranger_saves_and_pushes_it_again(hub, push_here, pull, made, expected, tmp_path):
    push_here(made)
    pull("alice/tiny", expected, code=LOAD_AND_SAVE)
    again = tmp_path / "elsewhere" / "again"
    for name in ("upcycle_receipt.json", "README.md"):
        assert (again / name).read_bytes() == hub.files("alice/tiny")[name]
    push_here(again)
    files = hub.files("alice/tiny")
    assert "model.safetensors" not in files  # the host would load it before the shards
    assert "model.safetensors.index.json" in files
    pull("alice/tiny", expected, home="third")


def test_push_to_hub_of_model_processor_and_card(hub, run_python, pull, converted, expected):
    run_python(PUSH_FROM_PYTHON, hub.env(), arguments=[converted])
    files = hub.files("alice/python")
    assert sum(name.endswith(".safetensors") for name in files) > 1
    assert set(files) >= TREE - {"model.safetensors"}
    assert files["README.md"] == (converted / "README.md").read_bytes()
    pull("alice/python", expected, code=LOAD + LOAD_PROCESSOR)
    first = next(one for one in hub.repos["alice/python"].commits.values() if "README.md" in one)
    assert b"upcycle_receipt.json" in first["README.md"]  # the model's own card, not the host's blanks
    assert b"- mine" in first["README.md"]
    assert set(hub.files("alice/saved")) >= {"upcycle_receipt.json", "README.md", "config.json", "modeling_vlmoe.py"}
    assert set(hub.files("alice/processor")) >= {"processor_config.json", "processing_vlmoe.py", "tokenizer.json"}


def test_an_adapter_pushed_by_peft_is_pulled_by_a_stranger(hub, push_here, run_python, pull, made, expected, tmp_path):
    push_here(made)
    run_python(PUSH_ADAPTER_FROM_PYTHON, hub.env(), arguments=[expected, tmp_path / "tuned.pt"])
    pull("alice/peft", tmp_path / "tuned.pt")


def test_tuning_from_the_hub_and_pushing_the_adapter(hub, vlmoe, push_here, pull, made, expected, rows, tmp_path):
    push_here(made)
    given = ["model=alice/tiny", f"data={rows}", f"output_dir={tmp_path / 'tuned'}", "max_steps=2", "use_cpu=true"]
    vlmoe(
        "finetune",
        "lora",
        *given,
        "report_to=none",
        "merge=true",
        "learning_rate=1e-2",
        "warmup_steps=0",
        env=hub.env(),
    )
    tuned = tmp_path / "tuned"
    card = ModelCard.load(tuned / "README.md")
    assert (card.data.base_model, card.data.base_model_relation) == (["alice/tiny"], "adapter")
    push_here(tuned, "alice/adapter")
    files = hub.files("alice/adapter")
    assert {"adapter_config.json", "adapter_model.safetensors", "upcycle_receipt.json", "README.md"} <= set(files)
    assert not any(name.startswith(("merged", "checkpoint")) for name in files)
    assert not any(str(tmp_path).encode() in body for body in files.values())  # no path of this machine
    found = torch.load(expected)
    model = AutoModelForImageTextToText.from_pretrained(tuned / "merged")
    with torch.no_grad():
        assert (model(**found["inputs"]).logits - found["logits"]).abs().max() > 1e-4
    found["logits"] = AutoModelForImageTextToText.from_pretrained("alice/adapter")(**found["inputs"]).logits.detach()
    torch.save(found, tmp_path / "tuned.pt")
    pull("alice/adapter", tmp_path / "tuned.pt")
    merged = ModelCard.load(tuned / "merged" / "README.md")
    assert (merged.data.base_model, merged.data.base_model_relation) == (["alice/tiny"], "finetune")
    push_here(tuned / "merged", "alice/merged")
    assert AutoProcessor.from_pretrained(tuned / "merged").image_token_id == model.config.image_token_id
