"""lm_eval's `hf-multimodal` scores vlmoe by its remote code, vlmoe imported, and native LLaVA of equal weights
alike.
"""

import json
import os
import subprocess
import sys

import pytest
from PIL import Image

from tests import native_llava
from tests.models import processor
from tests.slow import often

COLOURS = ("red", "green", "blue")
NUM_TOKENS = 6
QUESTION = "what colour is the shape?"
TASK = """\
task: vlmoe_colours
dataset_path: json
dataset_kwargs:
  data_files:
    test: {rows}
test_split: test
output_type: generate_until
doc_to_image: !function reading.images
doc_to_text: "<image>{question}"
doc_to_target: answer
generation_kwargs:
  max_gen_toks: {num_tokens}
  do_sample: false
  until: ["</s>"]
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
"""
READING = """\
from PIL import Image


def images(row):
    return [Image.open(row["image"])]
"""
RUN = """\
import sys
{before}
from lm_eval.__main__ import cli_evaluate
cli_evaluate()
"""


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    """A task of three rows; the answers are what the model says of two of the pictures, and something else."""
    folder = tmp_path_factory.mktemp("task")
    rows = []
    for colour in COLOURS:
        Image.new("RGB", (24, 24), colour).save(folder / f"{colour}.png")
        answer = said_of(colour) if colour != "blue" else "nothing like it"
        rows.append({"image": str(folder / f"{colour}.png"), "answer": answer})
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "reading.py").write_text(READING)
    text = TASK.format(rows=folder / "rows.jsonl", question=QUESTION, num_tokens=NUM_TOKENS)
    (folder / "vlmoe_colours.yaml").write_text(text)
    return folder


def said_of(colour: str) -> str:
    ours, model = processor(), native_llava.vlmoe_model()
    picture = Image.new("RGB", (24, 24), colour)
    content = [{"type": "image", "image": picture}, {"type": "text", "text": QUESTION}]
    inputs = ours.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    output = model.generate(**inputs, max_new_tokens=NUM_TOKENS, do_sample=False)
    return ours.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def evaluate(folder, task, tmp_path, before="", **arguments):
    """The scores and the answers, by lm_eval's own command."""
    arguments = {"pretrained": folder, "dtype": "float32"} | arguments
    words = [
        *("--model", "hf-multimodal", "--model_args", ",".join(f"{key}={value}" for key, value in arguments.items())),
        *("--tasks", "vlmoe_colours", "--include_path", task, "--apply_chat_template", "--batch_size", 1),
        *("--device", "cpu", "--output_path", tmp_path, "--log_samples"),
    ]
    done = subprocess.run(
        [sys.executable, "-c", RUN.format(before=before), *map(str, words)],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=task,
        env=os.environ | {"HF_DATASETS_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr[-4000:]
    (scores,) = tmp_path.rglob("results_*.json")
    (samples,) = tmp_path.rglob("samples_*.jsonl")
    rows = [json.loads(line) for line in samples.read_text().splitlines()]
    score = json.loads(scores.read_text())["results"]["vlmoe_colours"]["exact_match,none"]
    return score, [row["resps"][0][0] for row in rows]


BLOCKED = "sys.modules['modeling_vlmoe'] = None"
WAYS = {
    "imported": {"before": "import modeling_vlmoe"},
    "remote code": {"before": BLOCKED, "trust_remote_code": True},
    "native": {"before": BLOCKED},
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    ours = native_llava.save_vlmoe(tmp_path_factory.mktemp("vlmoe"))
    return {
        "native": native_llava.save_native(tmp_path_factory.mktemp("native")),
        "imported": ours,
        "remote code": ours,
    }


@pytest.mark.parametrize("way", often(WAYS, "imported"))
def test_lm_eval_scores_what_generate_says(way, folders, task, tmp_path):
    score, answers = evaluate(folders[way], task, tmp_path, **WAYS[way])
    assert answers == [said_of(colour) for colour in COLOURS]
    assert len(set(answers)) > 1
    assert score == pytest.approx(2 / 3)
