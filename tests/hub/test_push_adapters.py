"""An adapter is pushed with the id of a model that the Hub has, and its folder is only read."""

import json

import pytest
from huggingface_hub import ModelCard

from modeling_vlmoe.push_checks import check_folder
from tests.hub.folders import edit


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_base_model_goes_into_what_is_pushed_not_into_the_folder(hub, push_here, adapter):
    """PEFT's own card, which names the folder of the model, is nobody's work: ours is pushed in its place."""
    before, config = contents(adapter), json.loads((adapter / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"].startswith("/")
    assert config["base_model_name_or_path"].encode() in before["README.md"]
    assert "whether the Hub has alice/tiny" in push_here(
        adapter, "alice/adapter", base_model="alice/tiny", dry_run=True
    )
    for repo_id, message in (
        ("bob/adapter", "403"),
        ("alice/adapter", "--base-model alice/tiny: the Hub has no such"),
    ):
        hub.repos.pop("alice/tiny", None)
        if repo_id == "bob/adapter":
            hub.write("alice/tiny", {"config.json": b"{}"})
        with pytest.raises(ValueError, match=message):
            push_here(adapter, repo_id, base_model="alice/tiny")
        assert contents(adapter) == before
        assert repo_id not in hub.repos
    hub.write("alice/tiny", {"config.json": b"{}"}, is_private=True)
    push_here(adapter, "alice/adapter", base_model="alice/tiny")
    assert contents(adapter) == before
    files = hub.files("alice/adapter")
    pushed = json.loads(files["adapter_config.json"])
    assert pushed == config | {"base_model_name_or_path": "alice/tiny", "revision": None}
    assert config["base_model_name_or_path"].encode() not in b"".join(files.values())
    card = ModelCard(files["README.md"].decode())
    assert (card.data.base_model, card.data.base_model_relation) == (["alice/tiny"], "adapter")
    assert "PEFT) of [alice/tiny]" in card.text


@pytest.mark.parametrize("base", ["out/base", "out/base/last", "./base"])
def test_raises_when_a_relative_path_is_no_model_of_the_hub(hub, push_here, adapter, base):
    edit(adapter / "adapter_config.json", base_model_name_or_path=base)
    with pytest.raises(ValueError, match=rf"belongs to {base}.*do not have\. Push .* --base-model user/name"):
        push_here(adapter, "alice/adapter")
    assert not hub.repos


def test_a_base_that_the_hub_has_is_left_as_it_is(hub, push_here, adapter):
    edit(adapter / "adapter_config.json", base_model_name_or_path="bob/base", revision="abc")
    hub.write("bob/base", {"config.json": b"{}"})
    push_here(adapter, "alice/adapter")
    assert hub.files("alice/adapter")["adapter_config.json"] == (adapter / "adapter_config.json").read_bytes()


@pytest.mark.parametrize("base", ["/home/me/up", "~/up", "", None])
def test_raises_when_an_adapters_model_is_on_this_machine_only(adapter, base):
    edit(adapter / "adapter_config.json", base_model_name_or_path=base)
    with pytest.raises(
        ValueError, match=r"which others do not have\. Push that model first .* --base-model user/name"
    ):
        check_folder(adapter)


def test_raises_when_base_model_is_no_id(adapter):
    with pytest.raises(ValueError, match="--base-model /home/me is no repository's id"):
        check_folder(adapter, "/home/me")


def test_raises_when_an_adapter_has_no_weights(adapter):
    (adapter / "adapter_model.safetensors").write_bytes(b"broken")
    with pytest.raises(ValueError, match="is corrupt or truncated"):
        check_folder(adapter)
    (adapter / "adapter_model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"adapter_model.safetensors is not there"):
        check_folder(adapter)
