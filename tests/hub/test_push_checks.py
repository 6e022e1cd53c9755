"""A push of what others could not load is refused before anything is sent, with the way to mend it."""

import json

import pytest

from modeling_vlmoe import push_checks
from modeling_vlmoe.push import push
from modeling_vlmoe.push_arguments import PushArguments
from modeling_vlmoe.push_checks import check_folder
from tests.hub.folders import edit


def dry(folder, **given):
    return push(PushArguments(folder=str(folder), **({"repo_id": "alice/tiny", "dry_run": True} | given)))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"folder": "nowhere"}, "There is no folder nowhere"),
        ({"folder": None}, "Give the folder to push"),
        ({"repo_id": None}, "Give the folder to push, and --repo-id"),
        ({"repo_id": "a/b/c"}, "--repo-id a/b/c is no repository's id; expected user/name"),
        ({"base_model": "c/up"}, "--base-model is given, but .* holds a whole model"),
    ],
)
def test_raises_when_the_arguments_are_wrong(made, given, message):
    with pytest.raises(ValueError, match=message):
        push(PushArguments(**({"folder": str(made), "repo_id": "alice/tiny", "dry_run": True} | given)))


def test_raises_when_there_is_no_model(made):
    (made / "config.json").unlink()
    with pytest.raises(ValueError, match=r"has no config.json and no adapter_config.json"):
        check_folder(made)


def test_raises_when_it_is_another_model(made):
    edit(made / "config.json", model_type="llama")
    with pytest.raises(ValueError, match="holds a llama model; expected a vlmoe one"):
        check_folder(made)


def test_raises_when_code_is_missing(made):
    (made / "modeling_vlmoe.py").unlink()
    with pytest.raises(ValueError, match=r"modeling_vlmoe.py is not there, which the auto_map in .* names"):
        check_folder(made)


def test_raises_when_what_code_imports_is_missing(made):
    (made / "sparse_moe.py").unlink()
    with pytest.raises(ValueError, match=r"imports .*sparse_moe.py, which is not there"):
        check_folder(made)


@pytest.mark.parametrize("name", ["config.json", "processor_config.json"])
def test_raises_when_there_is_no_auto_map(made, name):
    edit(made / name, auto_map=None)
    with pytest.raises(ValueError, match=f"{name} has no auto_map"):
        check_folder(made)


def test_raises_when_the_code_is_in_another_repository(made):
    auto_map = json.loads((made / "config.json").read_text())["auto_map"]
    edit(made / "config.json", auto_map={name: f"bob/other--{one}" for name, one in auto_map.items()})
    with pytest.raises(ValueError, match="takes its code from the repository bob/other"):
        check_folder(made)


@pytest.mark.parametrize("name", ["processor_config.json", "tokenizer.json"])
def test_raises_when_the_processor_is_not_whole(made, name):
    (made / name).unlink()
    with pytest.raises(
        ValueError, match=r"processor_config.json is not there|processor .* cannot be loaded|tokenizer"
    ):
        check_folder(made)


def test_raises_when_weights_are_missing_or_broken(made):
    weights = made / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ValueError, match="is corrupt or truncated"):
        check_folder(made)
    weights.unlink()
    with pytest.raises(ValueError, match=r"has no model.safetensors"):
        check_folder(made)
    (made / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"a": "model-00001-of-00002.safetensors"}})
    )
    with pytest.raises(ValueError, match=r"names shards that are not in .*model-00001-of-00002.safetensors"):
        check_folder(made)


def test_raises_when_a_shard_is_too_large(made, monkeypatch):
    monkeypatch.setattr(push_checks, "LARGEST_FILE", 1000)
    with pytest.raises(ValueError, match=r"Save the model again: save_pretrained\(..., max_shard_size=\"5GB\"\)"):
        check_folder(made)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ("license: [", "is no YAML mapping"),
        ("- mit", "is no YAML mapping"),
        ("base_model: /home/me/up", "is a path of this machine"),
        ("base_model: [c/up, a/b/c]", "base_model a/b/c is no repository's id"),
        (
            "tags: [x, 'base_model:adapter:/home/me/up']",
            "tag base_model:adapter:/home/me/up has a path of this machine",
        ),
        ("tags: ['base_model:adapter:../up']", "tag base_model:adapter:../up has a path .* write the Hub id"),
    ],
)
def test_raises_when_an_edited_cards_metadata_are_wrong(made, metadata, message):
    (made / "README.md").write_text(f"---\n{metadata}\n---\n# Mine\n")
    with pytest.raises(ValueError, match=message):
        dry(made)


def test_a_folder_without_a_card_gets_one(made):
    (made / "README.md").unlink()
    assert "README.md" in dry(made)


def test_only_files_of_known_names_go(made):
    kept = ["LICENSE", "NOTICE.txt", "tokenizer.model", "vocab.txt", "additional_chat_templates/tools.jinja"]
    private = ["LICENSE_KEY.txt", "NOTICE-private", "tokenizer_hf_token.json", "vocab.env", "secret.model"]
    private += ["chat_template.bak", "additional_chat_templates/old/tools.jinja", "notes/LICENSE", "model.env.py"]
    for name in (*kept, *private):
        (made / name).parent.mkdir(parents=True, exist_ok=True)
        (made / name).write_text("x")
    found = check_folder(made)
    assert set(kept) <= set(found.files)
    assert not set(private) & set(found.files)
    assert {"LICENSE_KEY.txt", "secret.model", "vocab.env"} <= set(found.left_out)
