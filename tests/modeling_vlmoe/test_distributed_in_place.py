"""Two gloo processes give a host's VLM that is sparse in place one process' logits, losses and steps."""

from pathlib import Path

import pytest

from tests import hosts
from tests.modeling_vlmoe.test_distributed import run
from tests.modeling_vlmoe.test_in_place import model
from tests.slow import often

SCRIPT = Path(__file__).with_name("two_processes_in_place.py")
FAMILIES = ["qwen2_5_vl", "idefics3", "llava_next"]
MODES = ["fsdp", "fsdp_ep", "tp"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folders = {family: tmp_path_factory.mktemp(family) for family in FAMILIES}
    for family, folder in folders.items():
        model(family).save_pretrained(folder)
        hosts.processor(family).save_pretrained(folder)
    return folders


@pytest.mark.parametrize("family", often(FAMILIES, "qwen2_5_vl"))
def test_two_processes_equal_one(saved, tmp_path, family):
    said = run(SCRIPT, family, saved[family], tmp_path, *MODES)
    assert all(f"{mode} equals one process" in said for mode in MODES)
