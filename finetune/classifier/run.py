"""The command, top to bottom: data, split, logistic regression, three runs per seed, one page of tables.

>>> run_classify(ClassifyArguments(output_dir="classifier"))
PosixPath('classifier')
"""

import json
import os
import shutil
import time
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import asdict, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import yaml

from .arguments import ClassifyArguments
from .baselines import logistic_regression, majority
from .data import Data, load_data
from .digits import write_digits
from .extras import new_figure, sklearn_module
from .models import image_sizes
from .report import collect, summary
from .scores import accuracy_by_task
from .stages import DENSE, SPARSE, START, Say, run_stage

SETTINGS, DIGITS, SPLIT = "classify_settings.yaml", "digits", "split.json"
RESULTS, TABLES = "results.json", "results.md"
# Pixels of a side, of image and patch: the digits are 8 x 8, and learnt fastest in quarters.
DIGIT_SIZES, OTHER_SIZES = (8, 4), (32, 8)
Job = tuple[int, str]


def resolve(args: ClassifyArguments) -> ClassifyArguments:
    """The settings with the images' sizes.

    Raises:
        ValueError: if the patches do not fill the image.
    """
    default_size, default_patch = DIGIT_SIZES if args.data is None else OTHER_SIZES
    size = args.image_size or default_size
    patch = args.patch_size or max(size * default_patch // default_size, 1)
    if size % patch:
        raise ValueError(f"--image-size is {size}, which --patch-size {patch} does not divide; choose one that does.")
    return replace(args, image_size=size, patch_size=patch)


def check_folder(args: ClassifyArguments) -> Path:
    """The command's folder, empty.

    Raises:
        ValueError: if it holds something, unless that is an earlier run and `force` is given.
    """
    root = Path(str(args.output_dir))
    if root.exists() and (not root.is_dir() or any(root.iterdir())):
        if not root.is_dir() or not args.force or not (root / SETTINGS).is_file():
            raise ValueError(
                f"--output-dir {root} is not empty. Name another folder, or give --force to empty what an earlier run "
                f"of this command (which leaves {SETTINGS}) has filled."
            )
        if args.data is not None and root.resolve() in (Path(args.data).resolve(), *Path(args.data).resolve().parents):
            raise ValueError(f"--force would delete --data {args.data}; name another output folder.")
        shutil.rmtree(root)
    root.mkdir(parents=True, exist_ok=True)
    return root


def make_data(root: Path, args: ClassifyArguments) -> Data:
    """The rows: the user's, or those of the digits, which are written first; the split is written down."""
    folder = root / DIGITS if args.data is None else Path(args.data)
    if args.data is None and not folder.is_dir():
        write_digits(folder, args.num_images)
    return load_data(folder, args.question, args.test_share)


def write_split(path: Path, data: Data) -> None:
    """Writes which images were trained on and which were not."""
    images = {name: sorted({row.image for row in rows}) for name, rows in (("train", data.train), ("test", data.test))}
    path.write_text(json.dumps(images, indent=1), encoding="utf-8")


def one_job(root: Path, args: ClassifyArguments, job: Job, say: Say | None = None) -> None:
    """One run of one seed, in this process."""
    seed, stage = job
    told = print_line if say is None else say
    run_stage(root, args, make_data(root, args), seed, stage, lambda text: told(f"seed {seed}, {stage}, {text}"))


def print_line(text: str) -> None:
    """Says a line from a process of its own."""
    print(text, flush=True)


def next_jobs(job: Job, has_controls: bool) -> list[Job]:
    """What a run makes possible: of the dense model, the sparse one and the control."""
    seed, stage = job
    return [(seed, SPARSE), *([(seed, DENSE)] if has_controls else [])] if stage == START else []


def run_jobs(root: Path, args: ClassifyArguments, seeds: range, say: Say) -> None:
    """Runs all seeds' stages, side by side where there are cores."""
    jobs: list[Job] = [(seed, START) for seed in seeds]
    default = 1 if torch.accelerator.is_available() else os.cpu_count() or 1
    processes = min(args.processes or default, len(jobs) * 2)
    if processes == 1:
        while jobs:
            job = jobs.pop(0)
            one_job(root, args, job, say)
            jobs += next_jobs(job, args.controls)
        return
    context: Any = get_context("spawn")
    with ProcessPoolExecutor(processes, context, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        running: dict[Future, Job] = {pool.submit(one_job, root, args, job): job for job in jobs}
        while running:
            done, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                job = running.pop(future)
                future.result()
                running |= {pool.submit(one_job, root, args, one): one for one in next_jobs(job, args.controls)}


def run_classify(args: ClassifyArguments, say: Callable[[str], None] = print) -> Path:
    """Trains classifiers, and their controls, and says how good they are.

    Args:
        args: the settings.
        say: takes lines and tables.

    Returns:
        The folder, with `results.md`, `results.json`, and of each seed a folder (see stages.py).

    Raises:
        ValueError: for what the user can mend, before anything is trained where it can be known.
    """
    sklearn_module("metrics")
    new_figure()
    args = resolve(args)
    if args.data is not None:
        load_data(Path(args.data), args.question, args.test_share)  # before the folder is emptied
    root = check_folder(args)
    (root / SETTINGS).write_text(yaml.safe_dump(asdict(args), sort_keys=False), encoding="utf-8")
    began = time.perf_counter()
    data = make_data(root, args)
    write_split(root / SPLIT, data)
    seeds = range(args.seed, args.seed + args.seeds)
    accuracy = {"commonest class": [accuracy_by_task(data.test, majority(data), data.tasks)]}
    if args.controls:
        found = logistic_regression(data, image_sizes(args)[0])
        accuracy["logistic regression on pixels"] = [accuracy_by_task(data.test, found, data.tasks)]
    run_jobs(root, args, seeds, say)
    results = collect(root, seeds, args.controls)
    results["accuracy"] = accuracy | results["accuracy"]
    results |= {
        "tasks": [task for task in data.tasks if any(row.task == task for row in data.test)],
        "num_train": len(data.train),
        "num_test": len(data.test),
        "num_test_images": len({row.image for row in data.test}),
        "wall_seconds": time.perf_counter() - began,
    }
    text = summary(results)
    (root / RESULTS).write_text(json.dumps(results, indent=1), encoding="utf-8")
    (root / TABLES).write_text(text + "\n", encoding="utf-8")
    say(f"\n{text}\n\nReports, pictures and models: {root}/seed-{args.seed}/sparse; {results['wall_seconds']:.0f} s")
    return root
