"""`vlmoe evaluate` and `vlmoe route` read what `vlmoe finetune` reads: every form, several sources, image folders."""

import json

import pytest

from modeling_vlmoe.finetune.evaluate.question_sets import own_questions
from modeling_vlmoe.finetune.evaluate.settings import EvaluateSettings
from tests.finetune.data import forms

FAST = ("--max-new-tokens", 2, "--samples", 10)


@pytest.fixture
def asked(tmp_path):
    """Questions with the answers of people, without their images, which are in another folder."""
    path = forms.write("jsonl", tmp_path / "images", [forms.as_vqa(forms.ONE), forms.as_vqa(forms.TEXT)])
    return path.rename(tmp_path / "asked.jsonl"), tmp_path / "images"


def test_evaluate_takes_several_data_in_their_forms(asked, base, tmp_path, vlmoe_here):
    path, images = asked
    told = tmp_path / "told.jsonl"
    told.write_text(json.dumps(forms.as_llava(forms.ONE)))
    words = ["--data", path, "--data", told, "--image-folder", images, "--by", "data_source"]
    done = vlmoe_here("evaluate", base, "vqa", *words, *FAST, "--output-dir", tmp_path / "out", "--json")
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout)
    assert results["data"]["name"] == "asked.jsonl + told.jsonl"
    groups = results["sets"]["vqa"]["by"]["data_source"]["groups"]
    counts = {name: next(iter(measures.values()))["n"] for name, measures in groups.items()}
    assert counts == {"asked.jsonl": 2, "told.jsonl": 1}


def test_all_answers_are_kept_for_evaluation(asked):
    path, images = asked
    questions = own_questions(EvaluateSettings("m", "vqa", data=str(path), image_folder=str(images)))
    assert [one.answers for one in questions.asked] == [("grey", "red", "red"), ("grey", "four", "four")]


def test_evaluate_asks_the_question_that_is_given(tmp_path):
    path = forms.write("jsonl", tmp_path, [{"image": "red.png", "caption": ["a", "b"]}] * 2)
    settings = EvaluateSettings("m", "caption", data=str(path), question="Say it.", data_format="captions")
    questions = own_questions(settings)
    assert questions.rows[0]["messages"][0]["content"][1]["text"] == "Say it."
    assert questions.asked[0].answers == ("a", "b")


@pytest.mark.slow
def test_route_takes_the_form_and_the_images_folder(asked, base, tmp_path, vlmoe_here):
    path, images = asked
    words = ["--format", "vqa", "--image-folder", images, "--num-shown", 1, "--output-dir", tmp_path / "out"]
    done = vlmoe_here("route", base, path, *words)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "out" / "routing.json").read_text())["datasets"][0]["rows"] == 2
