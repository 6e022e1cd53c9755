"""Base models are Hub ids, each once; their relation says what was done; data sets are Hub ids."""

import pytest

from modeling_vlmoe.model_cards import CardFacts
from modeling_vlmoe.model_cards.metadata import build_metadata
from tests.model_cards.folders import licence, parent, receipt


def facts(**given):
    empty = {"name": "m", "config": None, "adapter": None, "receipt": {}, "runs": [], "evaluation": None}
    return CardFacts(**(empty | {"eval_results": None, "steps": None, "num_stored": 0} | given))


def run(model="up", data="rows.jsonl", is_hub=False, **more):
    hub_id = model if is_hub else None
    return {
        "method": "align",
        "model": {"name": model, "hub_id": hub_id, **more},
        "data": {"hub_id": None, "name": data},
    }


def metadata(**given):
    return build_metadata(facts(**given)).to_dict()


def test_both_parents_are_base_models():
    found = metadata(receipt=receipt(text=parent("a/llm", licence("mit")), vision=parent("b/vit", licence("mit"))))
    assert found["base_model"] == ["a/llm", "b/vit"]
    assert found["base_model_relation"] == "merge"
    assert found["license"] == "mit"
    assert found["pipeline_tag"] == "image-text-to-text"
    assert found["library_name"] == "transformers"
    assert set(found["tags"]) >= {"vlmoe", "mixture-of-experts"}
    assert "datasets" not in found


@pytest.mark.parametrize(
    ("text", "vision", "wanted"),
    [
        (parent("a/one"), parent("a/one"), ["a/one"]),
        (parent("llm", hub=False), parent("b/vit"), ["b/vit"]),
        (parent("llm", hub=False), parent("vit", hub=False), None),
    ],
)
def test_local_parents_and_repeats_are_left_out(text, vision, wanted):
    found = metadata(receipt=receipt(text=text, vision=vision))
    assert found.get("base_model") == wanted
    assert found.get("base_model_relation") == ("merge" if wanted else None)


def test_a_tuned_local_parent_stands_for_its_own_parents():
    own = {"text": parent("a/llm"), "vision": parent("b/vit")}
    assert metadata(receipt=receipt(vlm=parent("tuned", hub=False, parents=own)))["base_model"] == ["a/llm", "b/vit"]
    assert metadata(receipt=receipt(vlm=parent("c/tuned", parents=own)))["base_model"] == ["c/tuned"]


def test_a_model_tuned_from_the_hub_is_a_finetune_of_it():
    given = receipt(text=parent("a/llm"), vision=parent("b/vit"))
    tuned = metadata(receipt=given, runs=[run("c/up", is_hub=True), run("aligned")])
    assert (tuned["base_model"], tuned["base_model_relation"]) == (["c/up"], "finetune")
    local = metadata(receipt=given, runs=[run("up"), run("aligned")])
    assert (local["base_model"], local["base_model_relation"]) == (["a/llm", "b/vit"], "merge")


def test_the_tuned_models_own_licence_comes_first():
    given = receipt(text=parent("a/llm", licence("mit")), vision=parent("b/vit"))
    assert metadata(receipt=given)["license"] == "unknown"
    tuned = metadata(receipt=given, runs=[run("c/up", is_hub=True, license=licence("apache-2.0"))])
    assert tuned["license"] == "apache-2.0"


@pytest.mark.parametrize(
    ("base", "wanted"),
    [("c/up", ["c/up"]), ("/home/me/up", None), ("./up", None), ("", None), (None, None)],
)
def test_an_adapter_belongs_to_its_model(base, wanted):
    found = metadata(adapter={"base_model_name_or_path": base})
    assert found.get("base_model") == wanted
    assert found.get("base_model_relation") == ("adapter" if wanted else None)
    assert found["library_name"] == "peft"


def test_data_sets_of_the_hub_are_named_once():
    runs = [run(data="d/one"), run(data="rows.jsonl"), run(data="d/one")]
    runs[0]["data"]["hub_id"] = runs[2]["data"]["hub_id"] = "d/one"
    assert metadata(runs=runs)["datasets"] == ["d/one"]
