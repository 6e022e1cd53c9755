"""What is logged and shown follows transformers' verbosity, the command's flags, and who watches."""

import io
import logging
import os
import subprocess
import sys

import pytest
import transformers

from modeling_vlmoe import logs

OURS = ("modeling_vlmoe", "modeling_vlmoe.processing_vlmoe", "modeling_vlmoe.conversion.upcycle")


@pytest.fixture(autouse=True)
def _as_before(monkeypatch):
    level = transformers.logging.get_verbosity()
    monkeypatch.setattr(os, "environ", os.environ.copy())
    yield
    transformers.logging.set_verbosity(level)
    logging.getLogger("modeling_vlmoe").setLevel(logging.NOTSET)


@pytest.mark.parametrize("name", OURS)
@pytest.mark.parametrize("level", ["debug", "info", "warning", "error"])
def test_transformers_verbosity_is_ours(name, level):
    getattr(transformers.logging, f"set_verbosity_{level}")()
    assert logging.getLogger(name).getEffectiveLevel() == getattr(logging, level.upper())


def test_what_we_log_goes_where_transformers_logs():
    heard = io.StringIO()
    handler = logging.StreamHandler(heard)
    transformers.logging.add_handler(handler)
    try:
        transformers.logging.set_verbosity_info()
        logging.getLogger(OURS[1]).info("a picture")
        transformers.logging.set_verbosity_error()
        logging.getLogger(OURS[1]).warning("another")
    finally:
        transformers.logging.remove_handler(handler)
    assert heard.getvalue() == "a picture\n"


@pytest.mark.parametrize(
    ("given", "own", "host"),
    [
        ({}, "WARNING", "WARNING"),
        ({"num_verbose": 1}, "INFO", "WARNING"),
        ({"num_verbose": 2}, "DEBUG", "INFO"),
        ({"is_quiet": True}, "ERROR", "ERROR"),
    ],
    ids=str,
)
def test_flags_set_both_levels(given, own, host):
    """In a process that imports transformers later, as the command does."""
    code = (
        f"import sys; sys.argv[0] = 'vlmoe'; from modeling_vlmoe import logs; logs.set_verbosity(**{given})\n"
        "import logging, transformers.utils.logging as host\n"
        "host.get_logger('transformers.anything')\n"
        "print(*(logging.getLevelName(logging.getLogger(name).getEffectiveLevel()) for name in "
        f"({OURS[2]!r}, 'transformers.anything')))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.split() == [own, host], done.stderr


def test_raises_when_it_is_to_be_loud_and_quiet():
    with pytest.raises(ValueError, match="-v and -q are given together"):
        logs.set_verbosity(1, is_quiet=True)


@pytest.mark.parametrize(
    ("asked", "is_terminal", "is_quiet", "is_hidden"),
    [
        (None, True, False, False),
        (None, False, False, True),
        (None, True, True, True),
        ("1", True, False, True),
        ("true", True, False, True),
        ("0", False, False, False),
    ],
)
def test_bars_are_hidden_where_nobody_watches(monkeypatch, asked, is_terminal, is_quiet, is_hidden):
    for name in logs.BAR_SWITCHES:
        os.environ.pop(name, None)
    if asked is not None:
        os.environ[logs.HUB_BARS] = asked
    monkeypatch.setattr(sys.stderr, "isatty", lambda: is_terminal, raising=False)
    logs.hide_bars(is_quiet)
    assert (os.environ.get("TQDM_DISABLE") == "1") == is_hidden


@pytest.mark.parametrize(("switch", "is_drawn"), [("0", True), ("1", False)])
def test_no_library_draws_a_bar_where_they_are_hidden(switch, is_drawn):
    code = (
        "import sys; sys.argv[0] = 'vlmoe'; from modeling_vlmoe import logs; logs.hide_bars()\n"
        "import tqdm.auto, datasets, huggingface_hub.utils, transformers.utils.logging\n"
        "for library in (tqdm.auto, datasets.utils, huggingface_hub.utils, transformers.utils.logging):\n"
        "    for _ in library.tqdm(range(2), desc=library.__name__): pass\n"
    )
    environment = os.environ | {logs.HUB_BARS: switch}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, env=environment)
    assert done.returncode == 0, done.stderr
    assert [name in done.stderr for name in ("tqdm.auto", "datasets", "huggingface_hub", "transformers")] == [
        is_drawn
    ] * 4
