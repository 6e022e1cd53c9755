"""`vlmoe classify`: the whole run at a reduced size, a user's own folder, and (slow) its claims over three seeds."""

import json

import pytest
import torch
from PIL import Image
from transformers import AutoModelForSequenceClassification, AutoProcessor

from modeling_vlmoe.finetune.classifier.arguments import ClassifyArguments
from modeling_vlmoe.finetune.classifier.batches import ClassificationCollator, RowReader
from modeling_vlmoe.finetune.classifier.data import load_data
from modeling_vlmoe.finetune.classifier.digits import TASKS, write_digits
from modeling_vlmoe.finetune.classifier.models import build_processor, dense_config, upcycle_classifier
from modeling_vlmoe.finetune.classifier.report import pooled
from modeling_vlmoe.finetune.classifier.run import DIGITS, RESULTS, SETTINGS, TABLES, resolve, run_classify
from modeling_vlmoe.finetune.classifier.stages import MODEL, SPARSE, read_result, stage_folder
from modeling_vlmoe.finetune.classifier.training import HISTORY
from modeling_vlmoe.modeling_vlmoe import VLMoEForSequenceClassification
from modeling_vlmoe.towers import sparse_blocks

REDUCED = {"hidden_size": 32, "dense_epochs": 3, "epochs": 2, "seeds": 1, "processes": 1}
PARTS = ("vision layer 1", "vision layer 2", "connector")


@pytest.fixture(scope="module")
def reduced(tmp_path_factory):
    """One seed on 300 digits, in a width of 32: what it said, and its folder."""
    torch.manual_seed(0)
    said: list[str] = []
    args = ClassifyArguments(
        output_dir=str(tmp_path_factory.mktemp("classify")), num_images=300, learning_rate=3e-3, **REDUCED
    )
    return run_classify(args, say=said.append), said


def test_every_epoch_is_said_and_written(reduced):
    root, said = reduced
    for stage, epochs in (("dense-start", 3), ("dense", 2), ("sparse", 2)):
        history = json.loads((stage_folder(root, 0, stage) / HISTORY).read_text())
        assert [found["epoch"] for found in history] == list(range(1, epochs + 1))
        lines = [line for line in said if line.startswith(f"seed 0, {stage}, epoch")]
        for line, found in zip(lines, history, strict=True):
            for name in ("train_loss", "test_loss", "accuracy"):
                assert f"{name.replace('_', ' ')} {found[name]:.4f}" in line
        assert history[-1]["accuracy"] == pytest.approx(pooled(read_result(root, 0, stage)["accuracy"]))
        assert history[-1]["train_loss"] < history[0]["train_loss"]


def test_the_reduced_model_learns_from_image_and_text(reduced):
    """Far from the full size's accuracy, and far above what can be had without looking."""
    results = json.loads((reduced[0] / RESULTS).read_text())
    (lazy,), (sparse,) = results["accuracy"]["commonest class"], results["accuracy"]["sparse"]
    assert pooled(sparse) > pooled(lazy) + 0.1
    assert results["num_test_images"] == 75


def test_the_tables_hold_all_contestants_and_each_layers_routing(reduced):
    root, said = reduced
    text = (root / TABLES).read_text()
    assert text.strip() in said[-1]
    names = ("commonest class", "logistic regression on pixels", "dense, same epochs", "sparse", "text gates silent")
    for name in (*names, *PARTS, *(task.name for task in TASKS)):
        assert name in text, name
    layers = read_result(root, 0, SPARSE)["routing"]["layers"]
    assert set(layers) == set(PARTS)
    for layer in layers.values():
        assert 0 <= layer["divergence_bits"] <= 1.585
        for shares in layer["load"].values():
            assert sum(shares) == pytest.approx(1.0)


def test_report_and_pictures_are_written(reduced):
    folder = stage_folder(reduced[0], 0, SPARSE)
    assert "macro avg" in (folder / "report.txt").read_text()
    for name in ("confusion.png", "routing.png"):
        with Image.open(folder / name) as picture:
            assert min(picture.size) > 100


def test_the_saved_model_classifies_as_it_did(reduced):
    root, _ = reduced
    folder = stage_folder(root, 0, SPARSE) / MODEL
    model, processor = (
        AutoModelForSequenceClassification.from_pretrained(folder),
        AutoProcessor.from_pretrained(folder),
    )
    data = load_data(root / DIGITS, "What?", 0.25)
    rows = [row for row in data.test if row.task == "digit"]
    collate = ClassificationCollator(RowReader(processor), data.labels)
    with torch.no_grad():
        found = model(**collate(rows)).logits.argmax(-1).tolist()
    right = [model.config.id2label[index] == row.label for index, row in zip(found, rows, strict=True)]
    assert sum(right) / len(right) == pytest.approx(read_result(root, 0, SPARSE)["accuracy"]["digit"]["accuracy"])


def test_a_folder_that_is_in_use_is_not_emptied(reduced, tmp_path):
    root, _ = reduced
    with pytest.raises(ValueError, match="is not empty"):
        run_classify(ClassifyArguments(output_dir=str(root), **REDUCED))
    (tmp_path / "mine.txt").write_text("kept")
    with pytest.raises(ValueError, match=SETTINGS):
        run_classify(ClassifyArguments(output_dir=str(tmp_path), force=True, **REDUCED))
    with pytest.raises(ValueError, match="--force would delete --data"):
        run_classify(ClassifyArguments(output_dir=str(root), data=str(root / DIGITS), force=True, **REDUCED))
    assert (root / RESULTS).is_file()


def test_a_users_folder_of_classes_is_learnt_with_a_router_that_reads_the_image(tmp_path):
    for label, colour in (("red", (220, 20, 20)), ("blue", (20, 20, 220))):
        (tmp_path / "data" / label).mkdir(parents=True)
        for index in range(24):
            Image.new("RGB", (10 + index, 20), colour).save(tmp_path / "data" / label / f"{index}.jpg")
    args = ClassifyArguments(
        data=str(tmp_path / "data"),
        output_dir=str(tmp_path / "out"),
        router="softmax",
        controls=False,
        batch_size=4,
        **REDUCED,
    )
    root = run_classify(args, say=lambda text: None)
    found = read_result(root, 0, SPARSE)
    assert found["accuracy"]["What is in the image?"] == pytest.approx(
        {"accuracy": 1.0, "low": 0.757, "high": 1.0, "count": 12}, abs=1e-3
    )
    assert "silent" not in found
    assert [layer["divergence_bits"] for layer in found["routing"]["layers"].values()] == [0.0] * 3


@pytest.mark.parametrize("router", ["attention", "softmax"])
def test_the_upcycled_classifier_is_the_dense_one_while_experts_are_copies(tmp_path, router):
    data = load_data(write_digits(tmp_path, 80), "What?", 0.25)
    args = resolve(ClassifyArguments(output_dir="out", router=router, hidden_size=32, expert_noise=0.0))
    processor = build_processor(args, data)
    processor.marks_visible_text = True
    dense = VLMoEForSequenceClassification(dense_config(args, processor, data.labels)).eval()
    sparse = upcycle_classifier(dense, args).eval()
    batch = ClassificationCollator(RowReader(processor), data.labels)(data.test[:12])
    assert len(sparse_blocks(sparse)) == 3
    with torch.no_grad():
        wanted, given = dense(**batch), sparse(**batch)
        torch.testing.assert_close(given.logits, wanted.logits, rtol=0, atol=1e-5)
        args.expert_noise = 0.5
        apart = upcycle_classifier(dense, args).eval()(**batch)
    assert not torch.allclose(apart.logits, wanted.logits, atol=1e-3)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "--output-dir is missing"),
        ({"router": "expert"}, "--router is 'expert'; expected attention or softmax"),
        ({"experts": 1}, "--experts is 1; expected 2 or more"),
        ({"top_k": 4}, "--top-k is 4; expected 3, the experts, or fewer"),
        ({"test_share": 1.0}, "--test-share is 1.0; expected a share"),
        ({"learning_rate": 0.0}, "--learning-rate is 0.0; expected more than 0"),
        ({"seeds": "3"}, "seeds is '3'; expected int"),
        ({"data": "pets", "num_images": 5}, "--num-images is for the digits"),
        ({"shifts": 1}, "unknown keys: shifts"),
    ],
)
def test_raises_when_a_setting_cannot_work(values, message):
    given = ({"output_dir": "out"} if values else {}) | values
    with pytest.raises(ValueError, match=message):
        ClassifyArguments.from_dict(given, "the command line")


def test_raises_when_patches_do_not_fill_the_image():
    with pytest.raises(ValueError, match="--image-size is 8, which --patch-size 3 does not divide"):
        resolve(ClassifyArguments(output_dir="out", patch_size=3))


def test_raises_when_scikit_learn_is_missing(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "sklearn.metrics", None)
    with pytest.raises(ValueError, match=r"pip install 'vlmoe\[classify\]'"):
        run_classify(ClassifyArguments(output_dir=str(tmp_path / "out"), **REDUCED))
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_sparse_classifier_reads_digits_and_its_text_routes_the_image(tmp_path):
    """The command with its own defaults: three seeds, controls, a quarter of the images never trained on."""
    root = run_classify(ClassifyArguments(output_dir=str(tmp_path / "out")))
    runs = [read_result(root, seed, SPARSE) for seed in range(3)]
    for run in runs:
        print(json.dumps(run["accuracy"]))
        assert run["accuracy"]["digit"]["count"] == 450
        assert run["accuracy"]["digit"]["accuracy"] >= 0.97
        assert max(layer["divergence_bits"] for layer in run["routing"]["layers"].values()) >= 0.05
