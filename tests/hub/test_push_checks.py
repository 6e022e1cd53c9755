"""A push of what others could not load is refused before anything is sent, with the way to mend it."""

import json

import pytest

from modeling_vlmoe import push_checks
from modeling_vlmoe.push import push
from modeling_vlmoe.push_arguments import PushArguments
from modeling_vlmoe.push_checks import check_folder


def edit(path, **changes):
    """Changes keys of a JSON file; None removes one."""
    values = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in values.items() if value is not None}))


def dry(folder, **given):
    return push(PushArguments(folder=str(folder), **({"repo_id": "alice/tiny", "dry_run": True} | given)))


@pytest.fixture
def adapter(made):
    """The model's folder, turned into an adapter's (its weights stand in for the adapter's)."""
    (made / "config.json").unlink()
    (made / "model.safetensors").rename(made / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "base_model_name_or_path": "alice/tiny", "revision": "abc"}
    (made / "adapter_config.json").write_text(json.dumps(config))
    return made


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


@pytest.mark.parametrize("base", ["/home/me/up", "~/up", "", None])
def test_raises_when_an_adapters_model_is_on_this_machine_only(adapter, base):
    edit(adapter / "adapter_config.json", base_model_name_or_path=base)
    with pytest.raises(
        ValueError, match=r"which others do not have\. Push that model first .* --base-model user/name"
    ):
        dry(adapter)


def test_base_model_is_written_into_the_adapter(adapter):
    path = adapter / "adapter_config.json"
    edit(path, base_model_name_or_path="/home/me/up")
    before = path.read_text()
    assert "would go to" in dry(adapter, base_model="alice/tiny")
    assert path.read_text() == before
    check_folder(adapter, "alice/tiny")
    config = json.loads(path.read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == ("alice/tiny", None)
    with pytest.raises(ValueError, match="--base-model /home/me is no repository's id"):
        check_folder(adapter, "/home/me")


def test_raises_when_an_adapter_has_no_weights(adapter):
    (adapter / "adapter_model.safetensors").write_bytes(b"broken")
    with pytest.raises(ValueError, match="is corrupt or truncated"):
        check_folder(adapter)
    (adapter / "adapter_model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"adapter_model.safetensors is not there"):
        check_folder(adapter)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ("license: [", "is no YAML mapping"),
        ("- mit", "is no YAML mapping"),
        ("base_model: /home/me/up", "is a path of this machine"),
        ("base_model: [c/up, a/b/c]", "base_model a/b/c is no repository's id"),
    ],
)
def test_raises_when_an_edited_cards_metadata_are_wrong(made, metadata, message):
    (made / "README.md").write_text(f"---\n{metadata}\n---\n# Mine\n")
    with pytest.raises(ValueError, match=message):
        dry(made)


def test_a_folder_without_a_card_gets_one(made):
    (made / "README.md").unlink()
    assert "README.md" in dry(made)
