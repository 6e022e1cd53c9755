"""The demo: its plumbing with a handful of steps, and (slow) its claims over three seeds at full size."""

import json

import pytest
from huggingface_hub import ModelCard

from modeling_vlmoe.finetune.demo.report import ROWS
from modeling_vlmoe.finetune.demo.run import StageError, run_demo
from modeling_vlmoe.finetune.demo.scenes import KINDS
from modeling_vlmoe.finetune.demo.settings import DemoSettings
from modeling_vlmoe.finetune.demo.stages import TUNED, read_result

HANDFUL = DemoSettings(
    min_parent_accuracy=0.0,
    text_hidden_size=32,
    text_num_layers=2,
    text_intermediate_size=48,
    text_num_documents=300,
    text_steps=4,
    vision_hidden_size=32,
    vision_intermediate_size=48,
    vision_num_images=64,
    vision_steps=3,
    num_align=64,
    align_steps=2,
    num_train=80,
    tune_steps=2,
    num_test=50,
)


def test_the_whole_demo_runs(tmp_path):
    said: list[str] = []
    root = run_demo(tmp_path / "demo", HANDFUL, say=said.append)
    text = "\n".join(said)
    assert all(name in text for name in (*ROWS, *KINDS))
    assert "trust_remote_code, without the package (transformers_modules)" in text
    assert "the experts are still copies" in text  # after two steps they are
    assert (root / "demo.png").stat().st_size > 10_000
    assert (root / "results.txt").read_text().splitlines()[0].startswith("Parents on held-out scenes")
    assert read_result(root, "upcycle")["proof"]["largest_gap"] <= 1e-5
    card = ModelCard.load(root / TUNED / "README.md")
    assert card.data.license == "apache-2.0"
    assert all(f"| {name} | " in card.text for name in ROWS if name != "sparse")
    assert all(words in card.text for words in ("# vlmoe-demo", "1. `align`", "2. `lora`", "80 rows", "2 steps"))
    assert str(tmp_path) not in card.content
    with pytest.raises(ValueError, match="is not empty"):
        run_demo(root, HANDFUL)


@pytest.mark.slow
def test_the_demo_stops_at_a_parent_that_is_not_good_enough(tmp_path):
    settings = DemoSettings(**(vars(HANDFUL) | {"min_parent_accuracy": 0.95}))
    with pytest.raises(StageError, match=r"expected at least 0\.950"):
        run_demo(tmp_path / "demo", settings, say=lambda text: None)
    assert not (tmp_path / "demo/parents/text/config.json").exists()


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_sparse_model_sees(tmp_path, seed):
    root = run_demo(tmp_path / "demo", DemoSettings(seed=seed))
    majority = read_result(root, "data")["majority"]
    sparse, shuffled = (read_result(root, name)["accuracy"] for name in ("sparse", "shuffled"))
    print(json.dumps({name: read_result(root, stage)[key]["accuracy"] for name, (stage, key) in ROWS.items()}))
    assert sparse["count"] == 2000
    assert sparse["accuracy"] >= 0.85
    assert shuffled["accuracy"] <= majority["accuracy"] + 0.05
    for kind in KINDS:
        assert sparse["groups"][kind]["accuracy"] >= majority["groups"][kind]["accuracy"] + 0.25, kind
