"""A push into a repository that has something already: what an earlier push left goes, what others added stays."""

import json
import shutil

import pytest
from transformers import AutoModelForImageTextToText, AutoProcessor

THEIRS = {"notes.txt": b"theirs", "eval/results.json": b"{}", "model-notes.safetensors.txt": b"x", "LICENSE": b"x"}
RECORDS = ("training_history.json", "evaluation.json", "card_notes.yaml")


@pytest.mark.slow
def test_a_second_push_keeps_code_and_what_others_added(hub, push_here, made):
    first = {
        "training_history.json": "[]",
        "card_notes.yaml": "title: Mine\n",
        "chat_template.jinja": "{{ messages }}",
    }
    evaluation = {"metric": "accuracy", "n": 2, "accuracy": 0.5, "interval": [0.1, 0.9]}
    for name, text in (first | {"evaluation.json": json.dumps(evaluation)}).items():
        (made / name).write_text(text)
    template = (made / "chat_template.jinja").read_text()
    push_here(made)
    edited = b"---\nlicense: mit\n---\n# Mine\n"
    hub.write("alice/tiny", THEIRS | {"README.md": edited, "pytorch_model.bin": b"old"})
    before = hub.files("alice/tiny")
    assert {*RECORDS, "upcycle_receipt.json", "chat_template.jinja"} <= set(before)
    again = made.parent / "again"
    for kind in (AutoModelForImageTextToText, AutoProcessor):
        kind.from_pretrained("alice/tiny").save_pretrained(again, max_shard_size="100KB")
    for name in ("upcycle_receipt.json", "training_history.json"):
        (again / name).unlink()
    said = push_here(again)
    files = hub.files("alice/tiny")
    assert {name: files[name] for name in THEIRS} == THEIRS
    assert files["README.md"] == edited
    assert {name for name in before if name.endswith(".py")} == {name for name in files if name.endswith(".py")}
    gone = {"model.safetensors", "pytorch_model.bin", "upcycle_receipt.json", *RECORDS}
    assert set(before) - set(files) == gone
    assert "model.safetensors.index.json" in files
    assert all(name in said.partition("removed there, of an earlier push: ")[2] for name in gone)
    assert files["chat_template.jinja"].decode() == template
    assert len(hub.repos["alice/tiny"].commits) == 4  # the initial one, both pushes, and theirs: nothing in two steps


def test_a_chat_template_of_an_earlier_push_goes(hub, push_here, made):
    hub.write("alice/tiny", {"chat_template.json": b"{}", "additional_chat_templates/tools.jinja": b"x"})
    push_here(made)
    assert not {"chat_template.json", "additional_chat_templates/tools.jinja"} & set(hub.files("alice/tiny"))


def test_raises_when_a_repository_would_change_its_kind(hub, push_here, made, adapter):
    push_here(made)
    push_here(adapter, "alice/adapter", base_model="alice/tiny")
    before = {repo: dict(hub.files(repo)) for repo in hub.repos}
    refused = r"alice/tiny holds a whole model \(config.json, .*model.safetensors\), but .* holds an adapter"
    for revision in (None, "next"):  # a new branch would start as main
        with pytest.raises(ValueError, match=refused):
            push_here(adapter, base_model="alice/tiny", revision=revision)
    refused = (
        r"alice/adapter holds an adapter \(adapter_config.json, adapter_model.safetensors\), but .* a whole model"
    )
    with pytest.raises(ValueError, match=refused):
        push_here(made, "alice/adapter")
    assert {repo: dict(hub.files(repo)) for repo in hub.repos} == before
    assert set(hub.repos["alice/tiny"].branches) == {"main"}
    hub.write("alice/adapter", {"adapter_model.bin": b"old"})
    (made / "LICENSE").write_text("mine")
    shutil.copy(made / "LICENSE", adapter)
    push_here(adapter, "alice/adapter", base_model="alice/tiny")
    assert {"adapter_model.safetensors", "LICENSE"} <= set(hub.files("alice/adapter"))
    assert "adapter_model.bin" not in hub.files("alice/adapter")
