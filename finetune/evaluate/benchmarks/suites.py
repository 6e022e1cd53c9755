"""The table of benchmarks, and a suite's sets from a folder."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ..question_sets import QuestionSet
from . import gqa, mmbench, pope, scienceqa, textvqa, vqav2


@dataclass(frozen=True)
class Benchmark:
    """A public set.

    Attributes:
        name: as it is called.
        folder: where its files are, in the suite's folder.
        load: reads them.
    """

    name: str
    folder: str
    load: Callable[[Path], QuestionSet]


LLAVA = (
    Benchmark("VQAv2", "vqav2", vqav2.load),
    Benchmark("GQA", "gqa", gqa.load),
    Benchmark("TextVQA", "textvqa", textvqa.load),
    Benchmark("POPE", "pope", pope.load),
    Benchmark("ScienceQA", "scienceqa", scienceqa.load),
    Benchmark("MMBench", "mmbench", mmbench.load),
)
SUITES = {"llava": LLAVA}


def load_suite(name: str, data_dir: str) -> tuple[list[QuestionSet], dict[str, str]]:
    """The sets that are there, and why others are not.

    Args:
        name: the suite's.
        data_dir: the folder with one folder per benchmark.

    Raises:
        ValueError: if the folder is not there or holds none of them, or one of them is incomplete or empty.
    """
    root = Path(data_dir)
    if not root.is_dir():
        raise ValueError(f"data_dir {root} is no folder; name the one that holds the benchmarks' folders.")
    found, missing = [], {}
    for benchmark in SUITES[name]:
        folder = root / benchmark.folder
        if not folder.is_dir():
            missing[benchmark.name] = f"there is no folder {folder}"
            continue
        questions = benchmark.load(folder)
        if not questions.rows:
            raise ValueError(f"{benchmark.name} in {folder} holds no questions; download its files again.")
        found.append(questions)
    if not found:
        folders = ", ".join(benchmark.folder for benchmark in SUITES[name])
        raise ValueError(f"data_dir {root} holds none of the suite's folders ({folders}); put one there at least.")
    return found, missing
