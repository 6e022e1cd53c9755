"""The pages of docs/ name tests that exist, and every promise of expectations.md has one."""

import ast
import os
import re
import tempfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs").glob("*.md"))
NAMED = re.compile(r"`(tests/[\w./-]+)(?:::(\w+))?`")


def functions(path: Path) -> set[str]:
    nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    return {node.name for node in nodes if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_test_that_a_page_names_exists(page):
    for file, function in NAMED.findall(page.read_text(encoding="utf-8")):
        assert (ROOT / file).exists(), f"{page.name} names {file}, which is not there"
        assert not function or function in functions(ROOT / file), (
            f"{page.name} names {file}::{function}: no such test"
        )


def test_every_promise_has_a_test():
    rows = [line for line in (ROOT / "docs" / "expectations.md").read_text().splitlines() if line.startswith("| ")]
    promises = [row for row in rows if not row.startswith("| What you can rely on |")]
    assert len(promises) > 40
    for row in promises:
        assert any(function for _, function in NAMED.findall(row)), row


def test_the_home_of_this_run_is_a_temporary_one():
    """`conftest.py` fails the session when something is left in it."""
    assert Path.home().is_relative_to(tempfile.gettempdir())
    assert not (Path.home() / ".cache" / "huggingface").exists()
    for name in ("HF_HOME", "HF_MODULES_CACHE", "HF_DATASETS_CACHE", "TRACKIO_DIR"):
        assert Path(os.environ[name]).is_relative_to(tempfile.gettempdir())
