"""`vlmoe plan`: what it prints, and what it refuses."""

import json
import shutil
import sys

import pytest

from modeling_vlmoe import cli
from modeling_vlmoe.finetune.gpus import CPU, GPU, gpu_bytes, gpu_device
from modeling_vlmoe.finetune.memory_plan import PARTS
from modeling_vlmoe.finetune.planning import read_plan_recipe
from tests import hosts, tiny
from tests.finetune.host_rows import template


@pytest.mark.parametrize(
    ("given", "size"),
    [
        *(("24", 24), ("24GB", 24), ("0.5", 0.5), ("512GB", 512), ("24GiB", 25.769803776)),
        *(("rtx4090", 24), ("4090", 24), ("NVIDIA H100", 80), ("6000 Ada", 48), ("V100", 16), ("Tesla T4", 16)),
        *(("A100-SXM4-80GB", 80), ("NVIDIA H100 80GB HBM3", 80), ("V100 32GB", 32), ("3060 8GB", 8)),
    ],
)
def test_gpus_go_by_name_and_by_size(given, size):
    assert gpu_bytes(given) == pytest.approx(size * 10**9)


@pytest.mark.parametrize("given", ["Voodoo", "-24", "-24GB", "0", "1000", "", "a100 40", "4070 12", "nan"])
def test_raises_when_a_gpu_is_none(given):
    with pytest.raises(
        ValueError, match=r"--gpu is '.*'; expected GB, as 24 or 24GB, up to 300 without a unit, or one"
    ):
        gpu_bytes(given)


def test_old_gpus_are_known_for_it():
    assert gpu_device("T4").is_old
    assert gpu_device("V100 32GB").is_old
    assert gpu_device("4090") == gpu_device("24") == GPU


@pytest.fixture
def vlmoe(monkeypatch, capsys):
    """Runs a command in this process; returns its exit code and what it said."""

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["vlmoe", *map(str, words)])
        monkeypatch.setattr(cli.signal, "signal", lambda *_: None)
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        said = capsys.readouterr()
        return stopped.value.code or 0, said.out, said.err

    return run


def test_the_command_says_parts_and_fit_without_reading_weights(vlmoe, base, tmp_path):
    for file in base.iterdir():
        if file.suffix != ".safetensors":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    code, said, _ = vlmoe("plan", tmp_path, "--batch-size", 2, "--length", 80, "--gpu", "RTX 4090")
    assert code == 0
    assert f"{tmp_path}, lora: 2 x 80 tokens, 1 image each" in said
    assert all(part in said for part in (*PARTS, "peak"))
    assert "trained; on a GPU" in said
    assert "It fits on 24.00 GB" in said
    assert "With less memory" not in said


def test_the_command_names_what_would_take_less(vlmoe, dense_base):
    given = ["activation_checkpointing=false", "--batch-size", 4, "--length", 80, "--gpu", "0.5"]
    code, said, _ = vlmoe("plan", dense_base, "lora", *given)
    assert code == 0
    assert "It does not fit on 0.50 GB" in said
    named = ("activation_checkpointing=true", "per_device_train_batch_size=1", "method=align", "optim=", "--length 60")
    assert all(remedy in said for remedy in named), said


def test_the_command_takes_a_dense_vlm_of_the_hosts(vlmoe, tmp_path):
    hosts.save(tmp_path, "qwen2_5_vl")
    (tmp_path / "chat_template.jinja").write_text(template("qwen2_5_vl"))
    code, said, errors = vlmoe("plan", tmp_path, "--length", 64, "--image-size", "48x40", "--gpu", 8)
    assert code == 0, errors
    assert "It fits on 8.00 GB" in said


def test_parts_are_those_of_the_peak(vlmoe, tmp_path):
    """Of short rows it is at the loss: three times rows x tokens x vocabulary; of long ones in a layer's attention."""
    hosts.save(tmp_path, "gemma3")
    (tmp_path / "chat_template.jinja").write_text(template("gemma3"))
    size = 3 * 2 * 48 * 320 * 4 / 1e6
    for length, said_of_logits in ((48, f"{size:.1f} MB"), (256, "none then")):
        words = ["--length", length, "--batch-size", 2, "--image-size", "48x40", "--gpu", 8]
        code, said, errors = vlmoe("plan", tmp_path, *words)
        assert code == 0, errors
        assert next(line for line in said.splitlines() if "logits and loss" in line).endswith(said_of_logits)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["--gpu", "Voodoo"],
            "--gpu is 'Voodoo'; expected GB, as 24 or 24GB, up to 300 without a unit, or one of T4,",
        ),
        (["--length", "5"], "length is 5, but a question, its answer and the images' tokens are"),
        (["--image-size", "big"], "--image-size is 'big'; expected pixels"),
        (["--gpu", "-24"], "--gpu is '-24'; expected GB"),
        (["optim=lomo"], "optim is lomo, which cannot be planned here"),
        (["bf16=perhaps"], "bf16: Truthy value expected"),
        (["lora_ranks=3"], "has unknown keys: lora_ranks"),
        (["nothing.yaml"], "nothing.yaml"),
    ],
)
def test_refusals_are_one_message_and_exit_2(vlmoe, base, words, message):
    code, said, errors = vlmoe("plan", base, *words)
    assert code == cli.USER_ERROR
    assert message in errors
    assert said == ""


def test_raises_when_the_model_is_no_vlm_of_ours(vlmoe, tmp_path):
    tiny.save_text_parent(tmp_path, "llama")
    code, _, errors = vlmoe("plan", tmp_path)
    assert code == cli.USER_ERROR
    assert "is a llama model; expected a vlmoe one" in errors


@pytest.fixture
def copy_of(base, tmp_path):
    """A model's folder whose configuration may be changed."""

    def copy(**changes):
        folder = shutil.copytree(base, tmp_path / "copy")
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | changes))
        return folder

    return copy


@pytest.mark.parametrize("setting", ["bf16", "tf32", "fp16"])
def test_a_gpus_recipe_is_planned_where_there_is_none(setting, vlmoe, base):
    code, said, errors = vlmoe("plan", base, f"{setting}=true", "--length", 80, "--gpu", "H100")
    assert code == 0, errors
    assert "on a GPU" in said


def test_a_plan_keeps_whether_the_recipe_is_for_a_cpu(base):
    assert [read_plan_recipe(str(base), "lora", words).use_cpu for words in ([], ["use_cpu=true"])] == [False, True]


def test_without_a_gpu_the_plan_is_the_cpus_and_says_which_gpu_would_do(vlmoe, base):
    code, said, _ = vlmoe("plan", base, "use_cpu=true", "--length", 80)
    assert code == 0
    assert "trained; on a CPU" in said
    assert "It fits on a GPU of " in said
    assert CPU != GPU


def test_weights_that_are_saved_packed_are_not_planned_in_silence(vlmoe, copy_of):
    packing = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    code, said, errors = vlmoe("plan", copy_of(quantization_config=packing), "--length", 80, "--gpu", 8)
    assert code == 0, errors
    assert "saved packed (quantization_config: bitsandbytes), which is not counted" in said


def test_says_so_in_words_when_nothing_takes_less(vlmoe, base, monkeypatch):
    monkeypatch.setattr("modeling_vlmoe.finetune.planning.find_remedies", lambda *given: iter([]))
    _, said, _ = vlmoe("plan", base, "--length", 80, "--gpu", "0.5")
    assert "nothing of a recipe that could be changed takes less" in said
