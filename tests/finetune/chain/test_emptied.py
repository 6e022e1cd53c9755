"""A chain that is run again removes nothing that it reads, and nothing that no stage has written."""

import json
import shutil

import pytest
import yaml

from modeling_vlmoe.finetune.chain.emptied import emptied_folders
from modeling_vlmoe.finetune.chain.record import read_record
from modeling_vlmoe.finetune.chain.run import check_and_find
from modeling_vlmoe.finetune.recipe_runs import run_recipe
from tests.finetune.chain import chains
from tests.finetune.questions import question, write_rows

CHANGED = "align.learning_rate=1"


@pytest.fixture
def copy(whole, tmp_path):
    """A finished chain that a test may change."""
    shutil.copytree(whole[0], tmp_path / "out")
    return tmp_path / "out"


@pytest.fixture
def chain(parents, recipe, data, copy):
    return lambda *more: chains.parsed(recipe, chains.words(parents, data, copy, *more))


def paths(folder):
    return sorted(folder.rglob("*"))


def check_refused(chain, copy, message, unsaid="\n"):
    before = paths(copy)
    with pytest.raises(ValueError, match=message) as refusal:
        check_and_find(chain)
    assert unsaid not in str(refusal.value)
    assert paths(copy) == before


def test_raises_when_the_data_lie_in_a_stage(chain, copy, pictures):
    own = copy / "3-dense-tune" / "mine"
    shutil.copytree(pictures, own)
    words = [f"data={own / 'test.jsonl'}", CHANGED]
    check_refused(
        chain(*words, "force=true"), copy, "would delete .*3-dense-tune, which holds the data .*name another"
    )
    check_refused(chain(*words), copy, "has finished in .*learning_rate was .* or another output_dir.$", "force=true")
    assert check_and_find(chain(words[0])).emptied == ()


@pytest.mark.parametrize("name", ["eval_data", "image_folder"])
def test_raises_when_something_else_that_is_read_lies_in_a_stage(name, chain, copy, pictures):
    own = copy / "2-align" / "mine"
    shutil.copytree(pictures, own)
    given = own / "test.jsonl" if name == "eval_data" else own
    check_refused(chain(f"{name}={given}", "force=true"), copy, f"2-align, which holds the {name} .*mine")


def test_raises_when_the_model_is_a_stage_of_the_folder(copy, data, tmp_path):
    recipe = chains.write_recipe(tmp_path / "two.yaml", {"tune": {"method": "full"}, "more": {"method": "lora"}})
    words = [f"model={copy / '4-upcycle'}", f"data={data}", f"output_dir={copy}"]
    check_refused(chains.parsed(recipe, words), copy, "Stage tune has finished in .*another output_dir.$")
    check_refused(chains.parsed(recipe, [*words, "force=true"]), copy, "4-upcycle, which holds the model")


def test_raises_when_the_recipe_lies_in_a_stage(recipe, parents, data, copy):
    mine = shutil.copy(recipe, copy / "5-moe-tune" / "mine.yaml")
    with pytest.raises(ValueError, match=r"5-moe-tune, which holds the recipe .*mine.yaml; name another"):
        run_recipe(mine, chains.words(parents, data, copy, CHANGED, "force=true"))
    assert (copy / "5-moe-tune" / "mine.yaml").is_file()


@pytest.mark.parametrize("streaming", ["false", "true"])
def test_raises_when_an_image_lies_in_a_stage(streaming, chain, copy, pictures, tmp_path):
    shutil.copytree(pictures / "images", copy / "5-moe-tune" / "images")
    write_rows(tmp_path / "rows.jsonl", [question(["out/5-moe-tune/images/red.png"], "red")] * 4)
    words = [f"data={tmp_path / 'rows.jsonl'}", f"streaming={streaming}", "force=true"]
    check_refused(chain(*words), copy, "5-moe-tune, which holds .*png, an image of the data")


def test_raises_when_no_stage_has_written_a_folder(chain, copy):
    shutil.rmtree(copy / "5-moe-tune")
    (copy / "5-moe-tune").mkdir()
    (copy / "5-moe-tune" / "notes.txt").write_text("mine")
    check_refused(chain(CHANGED, "force=true"), copy, "5-moe-tune is in the place of a stage, but no stage has")


def test_raises_when_the_record_names_a_folder_elsewhere(chain, copy, tmp_path):
    (tmp_path / "mine").mkdir()
    record = chains.read(copy)
    record["stages"][4]["folder"] = "../mine"
    (copy / "chain.json").write_text(json.dumps(record))
    check_refused(chain(CHANGED, "force=true"), tmp_path, "chain.json is not as a chain writes it")


def test_force_empties_what_a_longer_recipe_has_left(chain, copy, parents, data, tmp_path):
    stages = dict(list(chains.STAGES.items())[:3])
    (tmp_path / "short.yaml").write_text(yaml.safe_dump(chains.SHARED | {"stages": stages}, sort_keys=False))
    short = chains.parsed(tmp_path / "short.yaml", chains.words(parents, data, copy, "force=true"))
    found = emptied_folders(short, read_record(copy), 3)
    assert [folder.name for folder in found] == ["4-upcycle", "5-moe-tune"]
