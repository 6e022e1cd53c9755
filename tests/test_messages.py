"""What a user is told when something is wrong: what was given, and what to do about it.

Whether a message names the field or the file is judged by the tests of each refusal; here every one of them is checked
for a next step: a word that asks for something, or says what would have been right.
"""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("modeling_vlmoe", "conversion", "finetune", "model_cards")
NEXT_STEP = re.compile(
    r"\b(add|build|check|choose|correct|cut|delete|did you mean|download|drop|empty|expected|free|give|known|leave"
    r"|load|lower|make|mark|mend|merge|name|only|pass|pip install|put|raise|remove|replace|save|say|select|set|shorten"
    r"|state|switch|take|train|try|unset|use|write)\b",
    re.IGNORECASE,
)
# What cannot be the user's doing: the mapping is total, or conversion has a bug.
OWN = {"conversion/mapping.py"}
MIN_LETTERS = 12  # a message with fewer is another's, handed on


def text(node: ast.expr) -> str:
    """The fixed words of a message, whatever is filled in left out."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(text(value) if isinstance(value, ast.Constant) else "{}" for value in node.values)
    return " ".join(text(child) for child in ast.iter_child_nodes(node) if isinstance(child, ast.expr))


def messages(path: Path) -> list[tuple[int, str]]:
    """The line and the words of each ValueError that says something."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        error = node.exc if isinstance(node, ast.Raise) else None
        if isinstance(error, ast.Call) and isinstance(error.func, ast.Name) and error.func.id == "ValueError":
            found.append((node.lineno, " ".join(map(text, error.args))))
    return found


SOURCES = [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]


@pytest.mark.parametrize(
    "path",
    [path for path in SOURCES if str(path.relative_to(ROOT)) not in OWN and messages(path)],
    ids=lambda path: str(path.relative_to(ROOT)),
)
def test_every_refusal_says_what_to_do(path):
    spoken = [(line, said) for line, said in messages(path) if sum(map(str.isalpha, said)) >= MIN_LETTERS]
    silent = [(line, said) for line, said in spoken if not NEXT_STEP.search(said)]
    assert not silent, "no next step in " + "\n".join(f"{path}:{line}: {said}" for line, said in silent)
