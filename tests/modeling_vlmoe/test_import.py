"""What `import modeling_vlmoe` does and does not do: each in a process of its own."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = sorted(
    path
    for folder in ("modeling_vlmoe", "conversion", "finetune", "model_cards")
    for path in (ROOT / folder).rglob("*.py")
)


def python(code: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=ROOT,
        env=os.environ | environment,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout + done.stderr


def test_importing_late_and_again_leaves_other_models_alone():
    said = python(
        "import importlib\n"
        "from transformers import AutoConfig, AutoModelForCausalLM\n"
        "from transformers.models.auto.modeling_auto import MODEL_MAPPING\n"
        "from tests import tiny\n"
        "before = type(AutoModelForCausalLM.from_config(tiny.text_config('llama')))\n"
        "import modeling_vlmoe\n"
        "config = type(AutoConfig.for_model('vlmoe'))\n"
        "modeling_vlmoe.register(); importlib.reload(modeling_vlmoe)\n"
        "assert config is modeling_vlmoe.VLMoEConfig is type(AutoConfig.for_model('vlmoe'))\n"
        "assert MODEL_MAPPING[config] is modeling_vlmoe.VLMoEModel\n"
        "assert type(AutoModelForCausalLM.from_config(tiny.text_config('llama'))) is before\n"
        "assert before.__module__.startswith('transformers.models.llama')\n"
    )
    assert said == ""


def test_importing_needs_neither_torchvision_nor_a_network_and_says_nothing():
    said = python(
        "import socket, sys\n"
        "for name in ('torchvision', 'trl', 'datasets', 'evaluate', 'matplotlib', 'tensorboard'):\n"
        "    sys.modules[name] = None\n"
        "def refuse(*args, **kwargs):\n"
        "    raise AssertionError('a network call')\n"
        "socket.socket.connect = socket.socket.connect_ex = socket.create_connection = socket.getaddrinfo = refuse\n"
        "import modeling_vlmoe\n"
        "from modeling_vlmoe import VLMoEForConditionalGeneration, VLMoEProcessor\n",
        HF_HUB_OFFLINE="0",
    )
    assert said == ""


def test_importing_takes_little_beside_what_it_imports():
    """Relative to torch and transformers in the same process, so that a busy machine does not decide."""
    hosts, ours = python(
        "import time; start = time.perf_counter()\n"
        "import torch, transformers.models.llava.modeling_llava, transformers.models.auto.processing_auto\n"
        "import transformers.trainer_utils\n"
        "hosts = time.perf_counter()\n"
        "import modeling_vlmoe\n"
        "print(hosts - start, time.perf_counter() - hosts)"
    ).split()[:2]  # bitsandbytes, which the host imports where it is installed, may have a word to say on stderr
    assert float(ours) < 0.2 * float(hosts), (ours, hosts)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_file_imports_all_of_a_package(path):
    imports = [
        node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.ImportFrom)
    ]
    assert not [node.module for node in imports if any(name.name == "*" for name in node.names)]
