"""Every test runs offline and leaves nothing outside its temporary folders.

Set before anything imports transformers.
"""

import os
import tempfile

_CACHE = tempfile.mkdtemp(prefix="vlmoe-tests-")
_HOME = os.path.join(_CACHE, "home")  # what slips past the variables below lands here, and is found at the end
os.makedirs(_HOME)
os.environ |= {
    "HOME": _HOME,
    "USERPROFILE": _HOME,
    "HF_HUB_OFFLINE": "1",
    "HF_HOME": _CACHE,
    "HF_MODULES_CACHE": os.path.join(_CACHE, "modules"),
    "HF_DATASETS_CACHE": os.path.join(_CACHE, "datasets"),
    "TRACKIO_DIR": os.path.join(_CACHE, "trackio"),
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "OMP_NUM_THREADS": "1",  # sums do not depend on the machine, and processes that are compared add up alike
}

import io
import logging
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers

from modeling_vlmoe import cli
from modeling_vlmoe.logs import BAR_SWITCHES, VERBOSITY
from tests.hub_server import Hub


@pytest.fixture(autouse=True, scope="session")
def _caches():
    """The one cache of the run; a file in the home's own means that somebody's real one would have been written to."""
    transformers.utils.logging.enable_propagation()  # so that `caplog` sees transformers and us
    yield
    strays = [path for path in Path(_HOME).rglob("*huggingface*/**/*") if path.is_file()]
    shutil.rmtree(_CACHE, ignore_errors=True)
    assert not strays, strays


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()


@pytest.fixture(autouse=True)
def _own_verbosity():
    """A command run in the tests' process sets levels and switches for good, as it may in its own."""
    switches = {name: os.environ.get(name) for name in (VERBOSITY, *BAR_SWITCHES)}
    loggers = [logging.getLogger(name) for name in ("modeling_vlmoe", "transformers")]
    levels = [one.level for one in loggers]
    yield
    for one, level in zip(loggers, levels, strict=True):
        one.setLevel(level)
    for name, value in switches.items():
        os.environ.pop(name, None)
        if value is not None:
            os.environ[name] = value


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
def run_python(tmp_path):
    """Runs Python code in a process of its own, from an empty folder, with caches of its own.

    `run(code, env, without_package=True)` keeps it from importing `modeling_vlmoe`; `fails=True` expects it to fail,
    and returns what it said on its way out instead of what it printed. What clients of the Hub read from the
    environment goes into `env` (`hub.env()`); `home` names another set of caches.
    """

    def run(code, env=None, *, without_package=False, fails=False, home="home", arguments=()):
        blocker = "import sys; sys.modules['modeling_vlmoe'] = None\n" if without_package else ""
        caches = {"HF_HOME": str(tmp_path / home), "HF_MODULES_CACHE": str(tmp_path / home / "modules")}
        folder = tmp_path / "elsewhere"
        folder.mkdir(exist_ok=True)
        done = subprocess.run(
            [sys.executable, "-c", blocker + code, *map(str, arguments)],
            cwd=folder,
            env=os.environ | caches | (env or {}),
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert (done.returncode != 0) == fails, done.stdout[-2000:] + done.stderr[-4000:]
        return done.stderr if fails else done.stdout

    return run


@pytest.fixture
def vlmoe_here(monkeypatch, capfd):
    """Runs the `vlmoe` command in this process, whose imports are paid for; `typed` is what its user types."""

    def run(*words, typed=""):
        capfd.readouterr()
        with monkeypatch.context() as patch:
            patch.setattr(sys, "argv", ["vlmoe", *map(str, words)])
            patch.setattr(sys, "stdin", io.StringIO(typed))
            patch.setattr(cli.signal, "signal", lambda *_: None)
            patch.setattr(cli, "hide_bars", lambda *_: None)
            with pytest.raises(SystemExit) as stopped:
                cli.main()
        said, errors = capfd.readouterr()
        return subprocess.CompletedProcess(words, stopped.value.code or 0, said, errors)

    return run


@pytest.fixture
def run_without_package(run_python):
    """Runs Python code in a process that cannot import `modeling_vlmoe`; returns what it printed."""
    return lambda code: run_python(code, without_package=True)


@pytest.fixture
def hub():
    """A Hub on this machine (see `hub_server.py`), empty."""
    with Hub.running() as running:
        yield running
