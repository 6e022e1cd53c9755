"""`vlmoe evaluate` from rows or benchmark files to tables, on tiny models; what is written is what was answered."""

import json
import shutil
from pathlib import Path

import pytest
from transformers import AutoModelForImageTextToText, AutoProcessor

from modeling_vlmoe.conversion import UpcycleArguments, upcycle
from modeling_vlmoe.finetune.data import load_chat_data
from modeling_vlmoe.finetune.evaluate.loading import load_checkpoint
from modeling_vlmoe.finetune.evaluate.question_sets import own_questions
from modeling_vlmoe.finetune.evaluate.settings import TASK_NAMES
from modeling_vlmoe.finetune.evaluation import generate_answers
from tests import hosts
from tests.finetune.evaluate import benchmark_files
from tests.finetune.host_rows import template
from tests.finetune.questions import question, write_rows

LENGTH = 4
FAST = ("--max-new-tokens", LENGTH, "--samples", 20)
KINDS = ("a", "a", "b", "b", "b", "c")


def said(folder, rows):
    """What a model answers, by the way that is tested elsewhere."""
    model = AutoModelForImageTextToText.from_pretrained(folder)
    processor = AutoProcessor.from_pretrained(folder)
    return generate_answers(model, processor, rows, batch_size=1, max_new_tokens=LENGTH)


@pytest.fixture(scope="module")
def answered(base, dense_base, pictures, tmp_path_factory):
    """Six rows with ten answers each: of rows 0, 1 and 3 the sparse model's own, of row 3 and 4 the dense one's.

    People never agree, as two of ten always say something else.
    """
    folder = tmp_path_factory.mktemp("answered")
    shutil.copytree(pictures / "images", folder / "images")
    names = ["red", "green", "blue", "white", "red", "green"]
    texts = ["which colour?", "say it", "say more", "a word", "colour", "what is there?"]
    asked = [
        question([f"images/{name}.png"], "nothing", text, kind)
        for name, text, kind in zip(names, texts, KINDS, strict=True)
    ]
    rows = load_chat_data(write_rows(folder / "asked.jsonl", asked))
    sparse, dense = said(base, rows), said(dense_base, rows)
    right = [sparse[0], sparse[1], "nothing", sparse[3], dense[4], "nothing"]
    for row, answer in zip(asked, right, strict=True):
        row["answers"] = [answer] * 8 + ["no such thing"] * 2
    return write_rows(folder / "rows.jsonl", asked), sparse, dense


@pytest.fixture(scope="module")
def result(base, dense_base, answered, tmp_path_factory):
    """The sparse model beside the dense one, by kind."""
    from modeling_vlmoe.finetune import EvaluateSettings, evaluate_checkpoints

    folder = tmp_path_factory.mktemp("result") / "out"
    settings = EvaluateSettings(
        str(base),
        "vqa",
        data=str(answered[0]),
        output_dir=str(folder),
        by="kind",
        control=[str(dense_base)],
        shuffle_images=True,
        num_samples=50,
        batch_size=4,
        max_new_tokens=LENGTH,
    )
    results, tables = evaluate_checkpoints(settings)
    return folder, results, tables


def test_predictions_are_what_the_models_say(result, answered):
    lines = [json.loads(line) for line in (result[0] / "predictions.jsonl").read_text().splitlines()]
    by_column = {}
    for line in lines:
        by_column.setdefault(line["column"], []).append(line["prediction"])
    assert by_column["this model"] == answered[1]
    assert by_column["control"] == answered[2]
    assert len(by_column["shuffled images"]) == 6
    assert [line["score"] for line in lines[:6]] == pytest.approx([1, 1, 0, 1, 0, 0])


def test_scores_groups_and_the_difference(result):
    found = result[1]["sets"]["vqa"]
    line = found["measures"]["soft_accuracy"]
    assert line["n"] == 6
    assert line["this model"]["mean"] == pytest.approx(3 / 6)
    assert line["control"]["mean"] == pytest.approx(1 / 6)
    assert line["difference"]["mean"] == pytest.approx(2 / 6)
    groups = found["by"]["kind"]["groups"]
    own = {
        name: (group["soft_accuracy"]["n"], group["soft_accuracy"]["this model"]["mean"])
        for name, group in groups.items()
    }
    assert own == {"a": (2, 1.0), "b": (3, pytest.approx(1 / 3)), "c": (1, 0.0)}
    gap = found["by"]["kind"]["worst_group_gap"]
    assert (gap["group"], gap["this model"]["mean"]) == ("c", pytest.approx(0.5))


def test_files_say_what_was_measured(result, base, dense_base):
    folder, results, tables = result
    assert json.loads((folder / "results.json").read_text()) == json.loads(json.dumps(results))
    assert (folder / "table.md").read_text() == tables
    assert f"this model: {base.name}; control: {dense_base.name}; shuffled images: {base.name}." in tables
    assert "\\begin{tabular}" in (folder / "table.tex").read_text()
    assert results["checkpoints"] == [{"name": base.name, "hub_id": None}]
    assert results["answers"] == "answers"
    assert (results["split"], results["data_format"], results["question"]) == ("test", "auto", None)
    assert (results["batch_size"], results["revision"], results["image_folder"]) == (4, None, None)
    assert str(base.parent) not in json.dumps(results)  # no path of this machine


# What a row's answer is for each task, and what else it has.
ANSWERS = {
    "vqa": ("red", {}),
    "caption": ("a red picture", {"answers": ["a red picture", "all red"]}),
    "yes-no": ("yes", {"category": "random"}),
    "anls": ("red", {}),
    "multiple-choice": ("B", {"choices": ["blue", "red"]}),
}


@pytest.mark.parametrize("task", TASK_NAMES)
def test_every_task_is_measured(task, base, pictures, tmp_path, vlmoe_here):
    answer, others = ANSWERS[task]
    shutil.copytree(pictures / "images", tmp_path / "images")
    rows = [question(["images/red.png"], answer) | others, question(["images/blue.png"], answer, "why?") | others]
    write_rows(tmp_path / "rows.jsonl", rows)
    done = vlmoe_here(
        *("evaluate", base, task, "--data", tmp_path / "rows.jsonl", "--output-dir", tmp_path / "out", *FAST, "--json")
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)["sets"][task]
    assert all(line["n"] == 2 for line in found["measures"].values())
    assert list(found["by"]) == (["category"] if task == "yes-no" else [])


def test_a_suite_is_measured_from_its_files(base, tmp_path, vlmoe_here):
    benchmark_files.make_suite(tmp_path / "sets", "vqav2", "gqa", "textvqa", "scienceqa", "pope", "mmbench")
    shutil.rmtree(tmp_path / "sets" / "gqa")
    out = tmp_path / "out"
    done = vlmoe_here(
        *("evaluate", base, "--suite", "llava", "--data-dir", tmp_path / "sets", "--output-dir", out, *FAST)
    )
    assert done.returncode == 0, done.stderr
    results = json.loads((out / "results.json").read_text())
    assert list(results["sets"]) == ["VQAv2", "TextVQA", "POPE", "ScienceQA", "MMBench"]
    assert list(results["missing"]) == ["GQA"]
    assert "GQA: not measured" in done.stdout
    assert "GQA: not measured" in done.stderr
    assert results["sets"]["MMBench"]["measures"]["accuracy"]["n"] == 2
    assert set(results["sets"]["POPE"]["by"]["category"]["groups"]) == {"random", "popular", "adversarial"}
    assert "f1, mean over category" in results["sets"]["POPE"]["measures"]
    lines = [json.loads(line) for line in (out / "predictions.jsonl").read_text().splitlines()]
    assert [line["id"] for line in lines if line["set"] == "MMBench"] == [241, 252, 1000241, 1000252, 2000241]
    assert {line["score"] for line in lines if line["set"] == "MMBench"} == {None}  # a pass alone counts for nothing


def test_several_seeds_spread_over_checkpoints(base, dense_base, answered, tmp_path, vlmoe_here):
    done = vlmoe_here(
        *("evaluate", base, "vqa", "--also", dense_base, "--data", answered[0], "--output-dir", tmp_path / "out"),
        *(*FAST, "--json"),
    )
    assert done.returncode == 0, done.stderr
    cell = json.loads(done.stdout)["sets"]["vqa"]["measures"]["soft_accuracy"]["this model"]
    assert cell["spread_over"] == "checkpoints"
    assert cell["mean"] == pytest.approx((3 / 6 + 1 / 6) / 2)
    assert cell["std"] == pytest.approx(2 / 6 / 2**0.5)  # of two numbers


def test_the_card_shows_it(base, dense_base, answered, tmp_path, vlmoe_here):
    mine = shutil.copytree(base, tmp_path / "mine")
    words = ("evaluate", mine, "vqa", "--data", answered[0], "--control", dense_base, "--by", "kind", "--card")
    done = vlmoe_here(*words, "--output-dir", tmp_path / "out", *FAST)
    assert done.returncode == 0, done.stderr
    text = (mine / "README.md").read_text()
    assert "Measured: VQA's soft accuracy of the normalised answer" in text
    assert "data: rows.jsonl, n = 6" in text
    assert f"| control: {dense_base.name} | 0.167 [" in text
    assert "| **this model** | 0.500 [" in text
    written = json.loads((mine / "evaluation.json").read_text())
    assert written["groups"]["b"]["n"] == 3
    again = vlmoe_here(*words, "--output-dir", tmp_path / "out", *FAST)
    assert again.returncode == 2
    assert "--force" in again.stderr
    assert vlmoe_here(*words, "--output-dir", tmp_path / "out", *FAST, "--force").returncode == 0


@pytest.mark.slow
def test_an_adapter_is_measured_as_its_merged_model(arguments, answered, tmp_path):
    from modeling_vlmoe.finetune import finetune, load_finetuned

    folder = finetune(arguments(output_dir=str(tmp_path / "tuned")))
    model, processor = load_checkpoint(str(folder))
    assert not hasattr(model, "peft_config")
    rows = load_chat_data(answered[0])
    adapted, _ = load_finetuned(folder)
    wanted = generate_answers(adapted, processor, rows, max_new_tokens=LENGTH)
    assert generate_answers(model, processor, rows, max_new_tokens=LENGTH) == wanted


def refusals(folder, base, rows):
    """What a user may get wrong, and what has to be named."""
    (folder / "full").mkdir()
    (folder / "full" / "kept.txt").write_text("mine")
    (folder / "sets").mkdir()
    (folder / "seed").mkdir()
    write_rows(folder / "words.jsonl", [question([], "perhaps")])
    write_rows(folder / "answers.jsonl", [question([], "red") | {"answers": 3}])
    shutil.copytree(Path(rows).parent / "images", folder / "images")
    write_rows(folder / "alike.jsonl", [question(["images/red.png"], "red")] * 2)
    write_rows(folder / "some.jsonl", [question([], "red") | {"people": ["red"]}, question([], "red")])
    task = (base, "vqa", "--data", rows)
    suite = (base, "--suite", "llava", "--data-dir", "sets")
    return [
        ((base,), "give a TASK (vqa, caption"),
        ((base, "vqa", "--suite", "llava"), "said twice"),
        ((base, "iou", "--data", rows), "no task 'iou'"),
        ((base, "vqa"), "name them by --data"),
        ((base, "--suite", "llava"), "--data-dir"),
        ((base, "--suite", "mine", "--data-dir", "sets"), "no suite 'mine'"),
        ((base, "--suite", "llava", "--data-dir", "sets"), "holds none of the suite's folders"),
        ((base, "--suite", "llava", "--data-dir", "sets", "--by", "kind"), "leave out --by"),
        ((*suite, "--answers", "people", "--question", "Q?"), "leave out --question, --answers"),
        ((*suite, "--format", "labels"), "leave out --format"),
        ((*suite, "--image-folder", "full", "--split", "dev"), "leave out --split, --image-folder"),
        ((*task, "--by", "colour"), "has no 'colour'"),
        ((*task, "--control", base, "--control", base), "There are 2 controls for 1 checkpoints"),
        ((*task, "--also", base, "--card"), "leave out also"),
        ((*task, "--also", f"{base}/"), "is given twice"),
        ((*task, "--also", "seed", "--also", "./seed"), "is given twice"),
        ((*task, "--answers", "human_answers"), "has no 'human_answers', as 6 of 6"),
        ((base, "vqa", "--data", "some.jsonl", "--answers", "people"), "Row 2 of the data has no 'people', as 1 of 2"),
        ((*task, "--samples", 1), "num_samples is 1"),
        ((base, "anls", "--data", "alike.jsonl", "--shuffle-images"), "Images cannot be shuffled"),
        ((*task, "--limit", 0), "limit is 0"),
        ((*task, "--output-dir", "full"), "kept.txt, which vlmoe evaluate did not write"),
        (("nobody/nothing", "vqa", "--data", rows), "nobody/nothing"),
        (("nobody/nothing", "vqa", "--data", rows, "--card"), "card writes into the checkpoint's folder"),
        ((base, "vqa", "--data", "nothing.jsonl"), "nothing.jsonl"),
        ((base, "yes-no", "--data", "words.jsonl"), "Row 1 of the data: the right answer to a yes"),
        ((base, "multiple-choice", "--data", "words.jsonl"), "Row 1 of the data: the right answer"),
        ((base, "caption", "--data", "words.jsonl"), "give two or more"),
        ((base, "vqa", "--data", "answers.jsonl"), "'answers' is 3; expected a list of texts"),
    ]


def test_refusals_come_before_any_answer_and_write_nothing(base, answered, tmp_path, monkeypatch, vlmoe_here):
    from modeling_vlmoe.finetune.evaluate import run

    cases = refusals(tmp_path, base, answered[0])
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(run, "generate_answers", lambda *_: pytest.fail("answered"))
    for words, named in cases:
        done = vlmoe_here("evaluate", *words)
        assert (done.returncode, done.stdout) == (2, ""), (words, done.stderr)
        assert named in done.stderr, (words, done.stderr)
        assert "Traceback" not in done.stderr
    assert sorted(tmp_path.rglob("*")) == before


def test_rows_without_the_usual_field_are_said(tmp_path):
    from modeling_vlmoe.finetune import EvaluateSettings

    rows = [question([], "red") | {"answers": ["red", "dark red"]}, question([], "blue")]
    settings = EvaluateSettings("m", "vqa", data=str(write_rows(tmp_path / "rows.jsonl", rows)))
    questions = own_questions(settings)
    assert [one.answers for one in questions.asked] == [("red", "dark red"), ("blue",)]
    assert questions.notes == (
        "Right answers: the field 'answers' of 1 of 2 rows, elsewhere what the assistant says.",
    )


def test_a_limit_is_said(base, answered, tmp_path, vlmoe_here):
    done = vlmoe_here(
        *("evaluate", base, "vqa", "--data", answered[0], "--limit", 2, "--output-dir", tmp_path / "out", *FAST)
    )
    assert "2 of 6 questions, evenly spaced." in done.stdout
    lines = Path(tmp_path / "out" / "predictions.jsonl").read_text().splitlines()
    assert [json.loads(line)["id"] for line in lines] == [1, 4]


@pytest.mark.parametrize(
    "family", ["qwen2_5_vl", *(pytest.param(name, marks=pytest.mark.slow) for name in ("llava_next", "smolvlm"))]
)
def test_a_host_sparse_in_place_is_measured_beside_its_dense_parent(family, pictures, tmp_path):
    """Just upcycled, the two say the same; so they do in batches of rows with two, one and no images."""
    from modeling_vlmoe.finetune import EvaluateSettings, evaluate_checkpoints

    dense = hosts.save(tmp_path / "dense", family)
    (dense / "chat_template.jinja").write_text(template(family))
    sparse = upcycle(UpcycleArguments(vlm_model=str(dense), output_dir=str(tmp_path / "sparse"), text_experts=4))
    found = []
    for size in (8, 1):
        settings = EvaluateSettings(
            str(sparse),
            "anls",
            data=str(pictures),
            split="train",
            output_dir=str(tmp_path / f"out{size}"),
            control=[str(dense)],
            num_samples=20,
            batch_size=size,
            max_new_tokens=LENGTH,
        )
        results, _ = evaluate_checkpoints(settings)
        line = results["sets"]["anls"]["measures"]["anls"]
        assert line["n"] == 8
        assert line["difference"] == {"mean": 0, "std": 0, "interval": [0, 0], "spread_over": "rows"}
        lines = [json.loads(line) for line in (tmp_path / f"out{size}" / "predictions.jsonl").read_text().splitlines()]
        found.append([line["prediction"] for line in lines])
    assert found[0] == found[1]
    assert found[0][:8] == found[0][8:]
    assert len(set(found[0])) > 1
