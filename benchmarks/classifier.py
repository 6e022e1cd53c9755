"""Writes what `vlmoe classify` found into docs/classifier.md: its tables, and the picture of the routing.

Run: vlmoe classify --output-dir classifier && python -m benchmarks.classifier classifier
"""

import argparse
import json
import shutil
from pathlib import Path

from modeling_vlmoe.finetune.classifier.pictures import ROUTING
from modeling_vlmoe.finetune.classifier.run import RESULTS, TABLES
from modeling_vlmoe.finetune.classifier.stages import SPARSE, stage_folder

PAGE = Path(__file__).parents[1] / "docs" / "classifier.md"
PICTURE = "classifier-routing.png"
BEGIN, END = "<!-- made by benchmarks/classifier.py -->", "<!-- end -->"


def write_page(root: Path, page: Path = PAGE) -> None:
    """Puts the tables of a run between the page's marks, and its picture beside the page.

    Args:
        root: the folder that `vlmoe classify` wrote.
        page: the page.
    """
    before, rest = page.read_text(encoding="utf-8").split(BEGIN)
    _, after = rest.split(END)
    seed = next(iter(json.loads((root / RESULTS).read_text(encoding="utf-8"))["routing"]))
    shutil.copyfile(stage_folder(root, int(seed), SPARSE) / ROUTING, page.with_name(PICTURE))
    tables = (root / TABLES).read_text(encoding="utf-8").strip()
    shown = f"![Where each task's image tokens go, seed {seed}]({PICTURE})"
    page.write_text(f"{before}{BEGIN}\n\n{tables}\n\n{shown}\n\n{END}{after}", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="what `vlmoe classify` wrote")
    write_page(parser.parse_args().folder)


if __name__ == "__main__":
    main()
