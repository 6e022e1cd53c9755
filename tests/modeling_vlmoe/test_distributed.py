"""Two gloo processes.

FSDP2, tensor parallelism, and either with expert parallelism (tokens exchanged, or outputs summed) give one process'
logits and steps, and save what one process or two load again.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests import variable_images
from tests.modeling_vlmoe.text_gates import GATE
from tests.models import EXPERTS, sparse_model
from tests.slow import often

SCRIPT = Path(__file__).with_name("two_processes.py")
ANY_SIZE = Path(__file__).with_name("two_processes_any_size.py")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folders = {vision: tmp_path_factory.mktemp(vision) for vision in ("siglip", "clip")}
    for vision, folder in folders.items():
        sparse_model("qwen3" if vision == "clip" else "llama", vision).save_pretrained(folder)
    folders["shared"] = tmp_path_factory.mktemp("shared")
    sparse_model(text_moe=EXPERTS | {"num_shared_experts": 1}).save_pretrained(folders["shared"])
    folders["delta"] = tmp_path_factory.mktemp("delta")
    sparse_model(text_moe=EXPERTS | {"expert_type": "delta", "expert_rank": 3}).save_pretrained(folders["delta"])
    return folders


def run(script, *arguments, fails=False):
    """What a script says in two processes; what it says on its way out, where it is to fail."""
    root = Path(__file__).parents[2]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone", str(script)]
    done = subprocess.run(
        [*command, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=root,
        env=os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"},
    )
    assert (done.returncode != 0) == fails, done.stderr[-4000:]
    return done.stderr if fails else done.stdout


@pytest.mark.parametrize(
    ("which", "modes"),
    [
        ("siglip", ["fsdp", "fsdp_ep", "tp", "tp_ep"]),
        pytest.param("clip", ["fsdp_ep"], marks=pytest.mark.slow),
        ("shared", ["fsdp_ep", "tp", "tp_ep"]),
        ("delta", ["fsdp"]),
    ],
)
def test_two_processes_equal_one(saved, tmp_path, which, modes):
    said = run(SCRIPT, saved[which], tmp_path, *modes)
    assert all(f"{mode} equals one process" in said for mode in modes)


@pytest.mark.parametrize("mode", often(["tp", "fsdp_ep"], "tp"))
def test_raises_when_delta_experts_are_to_be_split(saved, tmp_path, mode):
    said = run(SCRIPT, saved["delta"], tmp_path, mode, fails=True)
    what = "Tensor" if mode == "tp" else "Expert"
    assert (
        f"ValueError: {what} parallelism needs experts with weights of their own, but model.language_model.layers"
        in said
    )
    assert "vlmoe densify" in said


@pytest.mark.slow
def test_batches_with_and_without_images_of_any_size_side_by_side(tmp_path):
    for family in variable_images.TOWERS:
        variable_images.sparse_model(family, vision_moe=None).save_pretrained(tmp_path / family)
        variable_images.processor(family).save_pretrained(tmp_path / family)
    said = run(ANY_SIZE, *(tmp_path / family for family in variable_images.TOWERS))
    assert all(f"{family} is right" in said for family in variable_images.TOWERS)


@pytest.mark.slow
def test_text_gates_with_and_without_images_side_by_side(tmp_path):
    for family in variable_images.SPARSE_TOWERS[:2]:
        parts = {"vision_moe": GATE, "connector_moe": GATE}
        variable_images.sparse_model(family, **parts).save_pretrained(tmp_path / family)
        processor = variable_images.processor(family)
        processor.marks_visible_text = True
        processor.save_pretrained(tmp_path / family)
    said = run(ANY_SIZE, *(tmp_path / family for family in variable_images.SPARSE_TOWERS[:2]))
    assert all(f"{family} is right" in said for family in variable_images.SPARSE_TOWERS[:2])
