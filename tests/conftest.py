"""Every test runs offline and leaves nothing outside its temporary folders.

Set before anything imports transformers.
"""

import os
import tempfile

_CACHE = tempfile.mkdtemp(prefix="vlmoe-tests-")
os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "HF_HOME": _CACHE,
    "HF_MODULES_CACHE": os.path.join(_CACHE, "modules"),
    "HF_DATASETS_CACHE": os.path.join(_CACHE, "datasets"),
    "TRACKIO_DIR": os.path.join(_CACHE, "trackio"),
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "OMP_NUM_THREADS": "1",  # sums do not depend on the machine, and processes that are compared add up alike
}

import logging
import shutil
import subprocess
import sys

import pytest
import torch
import transformers


@pytest.fixture(autouse=True, scope="session")
def _caches():
    yield
    shutil.rmtree(_CACHE, ignore_errors=True)


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()


class _Deprecations(logging.Handler):
    """Collects what transformers logs, rather than warns, about deprecated use."""

    def __init__(self):
        super().__init__(logging.WARNING)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if "deprecat" in record.getMessage().lower():
            self.messages.append(record.getMessage())


@pytest.fixture(autouse=True)
def _no_deprecated_use():
    handler = _Deprecations()
    transformers.utils.logging.add_handler(handler)
    yield
    transformers.utils.logging.remove_handler(handler)
    assert not handler.messages, handler.messages


@pytest.fixture
def run_without_package(tmp_path):
    """Runs Python code in a process that cannot import `modeling_vlmoe`, from an empty folder.

    Returns what it printed.
    """
    blocker = "import sys; sys.modules['modeling_vlmoe'] = None\n"

    def run(code: str) -> str:
        done = subprocess.run(
            [sys.executable, "-c", blocker + code], cwd=tmp_path, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    return run
