"""lmms-eval finds the model `vlmoe` by its entry point, and scores what `generate` says on a task of this machine."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from modeling_vlmoe.finetune.evaluation import generate_answers
from tests.finetune.conftest import save_model
from tests.finetune.questions import question

COLOURS = ("red", "green", "blue")
NUM_TOKENS = 5
QUESTION = "what colour is the shape?"
TASK = """\
task: vlmoe_colours
dataset_path: json
dataset_kwargs:
  data_files:
    test: {rows}
test_split: test
output_type: generate_until
doc_to_visual: !function reading.images
doc_to_text: !function reading.text
doc_to_target: answer
generation_kwargs:
  max_new_tokens: {num_tokens}
  do_sample: false
  temperature: 0
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
"""
READING = """\
from PIL import Image


def images(row):
    return [Image.open(row["image"]).convert("RGB")] if row["image"] else []


def text(row):
    return "{question}" + " again" * row["again"]
"""
UNITS = """
from modeling_vlmoe.finetune.evaluate.lmms import VLMoE, as_row, cut, generation_arguments

assert cut("red. A circle\\n", [". ", "\\n"]) == "red"
assert cut(" red ", None) == "red"
assert generation_arguments({"until": ["x"], "temperature": 0, "top_p": 0.5}) == {
    "max_new_tokens": 128, "do_sample": False
}
assert generation_arguments({"do_sample": True, "temperature": 0.7, "num_beams": 2, "max_new_tokens": 3}) == {
    "max_new_tokens": 3, "do_sample": True, "num_beams": 2, "temperature": 0.7
}
for ask, said in (
    (lambda: generation_arguments({"logits_processor": 1}), "logits_processor"),
    (lambda: as_row([{"role": "user", "content": [{"type": "video", "url": "x"}]}], "t, row 1"), "holds a video"),
    (lambda: VLMoE(), "no pretrained"),
    (lambda: VLMoE(pretrained="x", speed=3), "speed"),
):
    try:
        ask()
    except ValueError as error:
        assert said in str(error), error
    else:
        raise AssertionError(said)
"""

ITS_OWN_SCORING = """
import importlib.util
import random
import sys
from pathlib import Path

import lmms_eval
from modeling_vlmoe.finetune.evaluate.asked import Asked
from modeling_vlmoe.finetune.evaluate.benchmarks import mmbench, textvqa, vqav2
from modeling_vlmoe.finetune.evaluate.vqa_answers import normalize_submission
from modeling_vlmoe.finetune.evaluate.yes_no import yes_no_measures, yes_no_statistics

tasks = Path(lmms_eval.__file__).parent / "tasks"

def load(path):
    spec = importlib.util.spec_from_file_location(path.replace("/", "_"), tasks / (path + ".py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module

process = load("_task_utils/vqa_eval_metric").EvalAIAnswerProcessor()
theirs = {name: load(name + "/utils") for name in ("vqav2", "textvqa", "pope")}
evaluator = load("mmbench/mmbench_evals").MMBench_Evaluator()
draw = random.Random(0)
words = "the a an two none isnt it's 1,000 2.5 .5 5. top-left U.S. no, yes? (x) dont 3-5 a/b 'q' he'd've 10:30".split()

def text(most=4):
    picked = draw.choices(words, k=draw.randint(1, most))
    return "".join(draw.choice([word, word + " ", " " + word]) for word in picked)

for _ in range(3000):
    written = text()
    assert normalize_submission(written) == process(written), written

for _ in range(500):
    people, said = [text(1) for _ in range(4)], text(1)
    answers = [draw.choice(people + [said]) for _ in range(10)]
    wanted = theirs["textvqa"].textvqa_process_results({"answers": list(answers), "question_id": 0}, [said])
    found = textvqa.statistics([said], [Asked(tuple(answers))])[0, 0]
    assert abs(found - wanted["exact_match"]) < 1e-9, (said, answers)
    if len({answer.strip() for answer in answers}) > 1:  # theirs normalises answers that agree, too
        document = {"answers": [{"answer": answer, "answer_id": place} for place, answer in enumerate(answers)]}
        submitted = normalize_submission(said)  # as LLaVA-1.5 does before it submits
        wanted = theirs["vqav2"].vqav2_process_results(document | {"question_id": 0}, [submitted])
        assert abs(vqav2.official_accuracy(said, answers) - wanted["exact_match"]) < 1e-9, (said, answers)

choices = ["cat", "dog", "a bird", "tree"]
parts = ["A", "B.", "(C)", "D:", "(A).", "C,", "cat", "dog", "is", "it", "the", "answer", "tree.", ":B", "nothing"]
for _ in range(3000):
    said = " ".join(draw.choices(parts, k=draw.randint(1, 6)))
    wanted = evaluator.can_infer(said, dict(zip("ABCD", choices))) or None
    assert mmbench.read_option(said, choices) == wanted, (said, wanted)

said, right = ([draw.choice(["yes", "no"]) for _ in range(60)] for _ in range(2))
documents = [{"answer": one, "question_id": 0} for one in right]
results = [theirs["pope"].pope_process_results(one, [given]) for one, given in zip(documents, said)]
counts = yes_no_statistics(said, [Asked((one,)) for one in right]).sum(0)
found = yes_no_measures(counts, counts.sum())
for place, name in enumerate(("accuracy", "precision", "recall", "f1_score")):
    wanted = getattr(theirs["pope"], "pope_aggregate_" + name)([one["pope_" + name] for one in results])
    assert abs(found[place] - wanted) < 1e-9, name
"""


@pytest.fixture(scope="module")
def apart():
    """lmms-eval stands apart from the environment: whole, it brings torchvision, timm and thirty packages more."""
    folder = Path(sys.prefix) / "lmms-eval"
    if not (folder / "lmms_eval").is_dir():
        pytest.fail(
            f"lmms-eval is not in {folder}. Run `make test`, or pip install --no-deps --target {folder} lmms-eval "
            "loguru tenacity"
        )
    return os.environ | {"PYTHONPATH": str(folder), "HF_DATASETS_OFFLINE": "1"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("lmms") / "model")


def said_of(folder, rows):
    model, processor = AutoModelForImageTextToText.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
    asked = []
    for row in rows:
        images = [Image.open(row["image"])] if row["image"] else []
        asked.append(question(images, "x", QUESTION + " again" * row["again"]))
    return generate_answers(model, processor, asked, batch_size=1, max_new_tokens=NUM_TOKENS)


@pytest.mark.slow
def test_lmms_eval_scores_what_generate_says(apart, folder, tmp_path):
    """Questions of unlike lengths share batches, one of them without an image; half the answers are the model's."""
    task = tmp_path / "task"
    task.mkdir()
    for colour in COLOURS:
        Image.new("RGB", (24, 24), colour).save(task / f"{colour}.png")
    rows = [{"image": str(task / f"{colour}.png"), "again": place} for place, colour in enumerate(COLOURS)]
    rows.append({"image": "", "again": 9})
    said = said_of(folder, rows)
    answered = [row | {"answer": said[place] if place % 2 else "nothing"} for place, row in enumerate(rows)]
    (task / "rows.jsonl").write_text("\n".join(map(json.dumps, answered)))
    (task / "reading.py").write_text(READING.format(question=QUESTION))
    (task / "vlmoe_colours.yaml").write_text(TASK.format(rows=task / "rows.jsonl", num_tokens=NUM_TOKENS))
    words = ["--model", "vlmoe", "--model_args", f"pretrained={folder},device=cpu", "--tasks", "vlmoe_colours"]
    words += ["--include_path", task, "--batch_size", 3, "--output_path", tmp_path / "out", "--log_samples"]
    done = subprocess.run(
        [sys.executable, "-m", "lmms_eval", *map(str, words)],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=tmp_path,
        env=apart,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    (samples,) = (tmp_path / "out").rglob("*samples_vlmoe_colours.jsonl")
    lines = sorted(map(json.loads, samples.read_text().splitlines()), key=lambda line: line["doc_id"])
    assert [line["filtered_resps"] for line in lines] == said
    assert len(set(said)) > 1
    (results,) = (tmp_path / "out").rglob("*results.json")
    score = json.loads(results.read_text())["results"]["vlmoe_colours"]["exact_match,none"]
    assert score == pytest.approx(0.5)


@pytest.mark.slow
def test_what_a_task_asks_for_is_done_or_refused(apart, tmp_path):
    done = subprocess.run([sys.executable, "-c", UNITS], capture_output=True, text=True, timeout=300, env=apart)
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.mark.slow
def test_lmms_evals_own_scoring_of_public_sets_is_ours(apart):
    """Answers drawn at random: VQAv2, TextVQA and their normalisation, MMBench's options, POPE's measures."""
    done = subprocess.run(
        [sys.executable, "-c", ITS_OWN_SCORING], capture_output=True, text=True, timeout=300, env=apart
    )
    assert done.returncode == 0, done.stderr[-4000:]
