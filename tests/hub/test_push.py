"""What is pushed is pulled whole: by branch, by commit, with the right token only, without the package too."""

import json

import pytest
import torch
from huggingface_hub import ModelCard
from transformers import AutoModelForImageTextToText, AutoProcessor

from tests.hub.pulled import LOAD, LOAD_AND_SAVE, PUSH_ADAPTER_FROM_PYTHON, PUSH_FROM_PYTHON
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

    def load(name, expected, token=None, code=LOAD, home="puller", **kwargs):
        given = {"without_package": True, "home": home, "arguments": [name, expected, json.dumps(kwargs)]}
        return run_python(code, hub.env(token), **given)

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


def test_a_dry_run_sends_nothing(hub, vlmoe, made):
    said = vlmoe("push", made, "--repo-id", "alice/tiny", "--dry-run", env=hub.env())
    assert "would go to alice/tiny" in said
    assert "model.safetensors" in said
    assert hub.requests == []


def test_a_branch_is_made_and_pulled_by_name_and_by_commit(hub, vlmoe, pull, made, expected):
    vlmoe("push", made, "--repo-id", "alice/tiny", "--revision", "next", env=hub.env())
    assert not hub.files("alice/tiny")
    pull("alice/tiny", expected, revision="next")
    commit = hub.repos["alice/tiny"].branches["next"]
    hub.repos["alice/tiny"].commit("next", {}, "emptied")
    pull("alice/tiny", expected, revision=commit, home="another")


def test_a_private_repository_wants_the_right_token(hub, vlmoe, run_python, made, expected):
    vlmoe("push", made, "--repo-id", "alice/secret", "--private", "--token", TOKENS["alice"], env=hub.env(None))
    assert hub.repos["alice/secret"].is_private
    load = {"without_package": True, "arguments": ["alice/secret", expected, "{}"]}
    run_python(LOAD, hub.env(), home="right", **load)
    for home, token in {"missing": None, "wrong": TOKENS["bob"], "unknown": "hf_x"}.items():
        said = run_python(LOAD, hub.env(token), home=home, fails=True, **load)
        assert "OSError" in said, said


def test_errors_of_the_hub_are_one_line_and_exit_2(hub, vlmoe, made):
    push = ("push", made, "--repo-id", "alice/tiny")
    missing = vlmoe(*push, env=hub.env(None), fails=True)
    assert missing.startswith("vlmoe: The Hub refuses the push to alice/tiny (401: ")
    assert "Log in by `hf auth login`, set HF_TOKEN, or give --token." in missing
    assert "(403: " in vlmoe(*push, env=hub.env(TOKENS["bob"]), fails=True)
    offline = vlmoe(*push, env=hub.env() | {"HF_HUB_OFFLINE": "1"}, fails=True)
    assert offline.strip() == "vlmoe: HF_HUB_OFFLINE keeps this process from the Hub; unset it to push."
    nowhere = vlmoe(*push, env=hub.env() | {"HF_ENDPOINT": "http://127.0.0.1:9"}, fails=True)
    assert nowhere.startswith("vlmoe: The Hub at http://127.0.0.1:9 cannot be reached: ")
    assert len(nowhere.strip().splitlines()) == 1
    hub.is_broken = True
    broken = vlmoe(*push, env=hub.env(), fails=True)
    assert broken.strip() == "vlmoe: The push to alice/tiny failed (503: Service unavailable). Try again later."


def test_a_public_repository_is_not_taken_for_a_private_one(hub, vlmoe, made):
    hub.write("alice/tiny", {"a.txt": b"a"})
    said = vlmoe("push", made, "--repo-id", "alice/tiny", "--private", env=hub.env(), fails=True)
    assert "alice/tiny is there already and public" in said
    assert set(hub.files("alice/tiny")) == {"a.txt"}


def test_a_second_push_keeps_code_and_what_others_added(hub, vlmoe, pull, made, expected, run_python):
    vlmoe("push", made, "--repo-id", "alice/tiny", env=hub.env())
    hub.write("alice/tiny", {"notes.txt": b"theirs", "README.md": b"---\nlicense: mit\n---\n# Mine\n"})
    run_python(
        "import sys, modeling_vlmoe\nfrom transformers import AutoModelForImageTextToText, AutoProcessor\n"
        "for kind in (AutoModelForImageTextToText, AutoProcessor):\n"
        "    kind.from_pretrained('alice/tiny').save_pretrained(sys.argv[1], max_shard_size='100KB')",
        hub.env(),
        arguments=[made.parent / "again"],
    )
    code = {name for name in hub.files("alice/tiny") if name.endswith(".py")}
    said = vlmoe("push", made.parent / "again", "--repo-id", "alice/tiny", env=hub.env())
    files = hub.files("alice/tiny")
    assert files["notes.txt"] == b"theirs"
    assert b"# Mine" in files["README.md"]
    assert code == {name for name in files if name.endswith(".py")}
    assert "model.safetensors" not in files  # the host would load it before the shards
    assert "model.safetensors.index.json" in files
    assert "went to" in said
    pull("alice/tiny", expected)


def test_an_edited_card_there_stays_and_it_is_said(hub, vlmoe, made):
    theirs = b"---\nlicense: mit\n---\n# Mine\n"
    hub.write("alice/tiny", {"README.md": theirs})
    said = vlmoe("push", made, "--repo-id", "alice/tiny", env=hub.env())
    assert hub.files("alice/tiny")["README.md"] == theirs
    assert "README.md: that of the repository has been edited, and stays" in said
    ours = (made / "README.md").read_text().replace("# made", "# My own words")
    (made / "README.md").write_text(ours)
    vlmoe("push", made, "--repo-id", "alice/tiny", env=hub.env())
    assert hub.files("alice/tiny")["README.md"].decode() == ours


def test_a_stranger_saves_and_pushes_it_again(hub, vlmoe, pull, made, expected, run_python, tmp_path):
    vlmoe("push", made, "--repo-id", "alice/tiny", env=hub.env())
    pull("alice/tiny", expected, code=LOAD_AND_SAVE)
    again = tmp_path / "elsewhere" / "again"
    for name in ("upcycle_receipt.json", "README.md"):
        assert (again / name).read_bytes() == hub.files("alice/tiny")[name]
    vlmoe("push", again, "--repo-id", "alice/second", env=hub.env())
    pull("alice/second", expected, home="third")


def test_push_to_hub_of_model_processor_and_card(hub, run_python, pull, converted, expected):
    run_python(PUSH_FROM_PYTHON, hub.env(), arguments=[converted])
    files = hub.files("alice/python")
    assert sum(name.endswith(".safetensors") for name in files) > 1
    assert set(files) >= TREE - {"model.safetensors"}
    assert files["README.md"] == (converted / "README.md").read_bytes()
    pull("alice/python", expected)
    first = next(one for one in hub.repos["alice/python"].commits.values() if "README.md" in one)
    assert b"upcycle_receipt.json" in first["README.md"]  # the model's own card, not the host's blanks
    assert b"- mine" in first["README.md"]
    assert set(hub.files("alice/saved")) >= {"upcycle_receipt.json", "README.md", "config.json", "modeling_vlmoe.py"}
    assert set(hub.files("alice/processor")) >= {"processor_config.json", "processing_vlmoe.py", "tokenizer.json"}
    load = "from transformers import AutoProcessor\np = AutoProcessor.from_pretrained('alice/processor', "
    load += "trust_remote_code=True)\nassert type(p).__name__ == 'VLMoEProcessor'"
    run_python(load, hub.env(None), without_package=True, home="processor")


def test_an_adapter_pushed_by_peft_is_pulled_by_a_stranger(hub, vlmoe, run_python, pull, made, expected, tmp_path):
    vlmoe("push", made, "--repo-id", "alice/tiny", env=hub.env())
    run_python(PUSH_ADAPTER_FROM_PYTHON, hub.env(), arguments=[expected, tmp_path / "tuned.pt"])
    pull("alice/peft", tmp_path / "tuned.pt")


def test_tuning_from_the_hub_and_pushing_the_adapter(hub, vlmoe, run_python, pull, made, expected, rows, tmp_path):
    vlmoe("push", made, "--repo-id", "alice/tiny", env=hub.env())
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
    vlmoe("push", tuned, "--repo-id", "alice/adapter", env=hub.env())
    files = hub.files("alice/adapter")
    assert {"adapter_config.json", "adapter_model.safetensors", "upcycle_receipt.json", "README.md"} <= set(files)
    assert not any(name.startswith(("merged", "checkpoint")) for name in files)
    assert not any(str(tmp_path).encode() in body for body in files.values())  # no path of this machine
    found = torch.load(expected)
    model = AutoModelForImageTextToText.from_pretrained(tuned / "merged")
    with torch.no_grad():
        assert (model(**found["inputs"]).logits - found["logits"]).abs().max() > 1e-4
    run_python(
        "import sys, torch, modeling_vlmoe\nfrom transformers import AutoModelForImageTextToText\n"
        "found = torch.load(sys.argv[1])\nmodel = AutoModelForImageTextToText.from_pretrained('alice/adapter')\n"
        "found['logits'] = model(**found['inputs']).logits.detach()\ntorch.save(found, sys.argv[2])",
        hub.env(),
        arguments=[expected, tmp_path / "tuned.pt"],
    )
    pull("alice/adapter", tmp_path / "tuned.pt")
    merged = ModelCard.load(tuned / "merged" / "README.md")
    assert (merged.data.base_model, merged.data.base_model_relation) == (["alice/tiny"], "finetune")
    vlmoe("push", tuned / "merged", "--repo-id", "alice/merged", env=hub.env())
    assert AutoProcessor.from_pretrained(tuned / "merged").image_token_id == model.config.image_token_id
