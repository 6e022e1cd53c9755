"""`python -m tests.conformance`: measures every cell and writes docs/router-losses.md (some minutes)."""

import warnings
from pathlib import Path

from tests import conftest  # noqa: F401 (offline, temporary caches, one thread)

warnings.filterwarnings("ignore")

if __name__ == "__main__":
    import torch

    from .table import render

    torch.set_num_threads(1)
    page = Path(__file__).parents[2] / "docs" / "router-losses.md"
    page.parent.mkdir(exist_ok=True)
    page.write_text(render(), encoding="utf-8")
    print(page)
