"""The demo, top to bottom: parents, upcycling, alignment, tuning, controls, evaluation, reloading, one table.

Independent stages run side by side as two processes with one thread each; their output goes to `logs/`.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from .settings import DemoSettings

# Phases one after another; in each, lanes side by side; in each, stages one after another in one process.
PHASES: tuple[tuple[tuple[str, ...], ...], ...] = (
    (("text",), ("vision", "data")),
    (("upcycle",),),
    (("sparse",), ("dense", "blind")),
    (("shuffled", "routing"), ("equal_time",)),
)
NUM_RELOADED = 40
RELOADED = """
import json
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor
torch.set_num_threads(1)
folder, rows, trust = {folder!r}, json.loads({rows!r}), {trust}
model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=trust)
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=trust)
processor.tokenizer.padding_side = "left"
chats = []
for row in rows:
    content = [{{"type": "image", "image": row["image"]}}, {{"type": "text", "text": row["question"]}}]
    chats.append([{{"role": "user", "content": content}}])
inputs = processor.apply_chat_template(
    chats, tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True,
    processor_kwargs={{"padding": True}},
)
new = model.generate(**inputs, max_new_tokens=4, do_sample=False)[:, inputs["input_ids"].shape[1]:]
answers = [text.strip() for text in processor.batch_decode(new, skip_special_tokens=True)]
print(json.dumps([type(model).__module__, answers]))
"""
WITH_PACKAGE = "import modeling_vlmoe\n"
WITHOUT_PACKAGE = "import sys\nsys.modules['modeling_vlmoe'] = None\n"


class StageError(ValueError):
    """A stage that stopped, and why."""


def start_lane(stages: tuple[str, ...], root: Path, settings: DemoSettings) -> tuple[subprocess.Popen, Path]:
    """Starts a process that runs these stages in one thread; returns it and its log."""
    log = root / "logs" / f"{'-'.join(stages)}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    options = [f"--{name}={value}" for name, value in asdict(settings).items()]
    command = [sys.executable, "-m", f"{__package__}.stages", "--output_dir", str(root), *options, "--stages", *stages]
    threads = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    with log.open("w", encoding="utf-8") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=os.environ | threads)
    return process, log


def run_phase(lanes: tuple[tuple[str, ...], ...], root: Path, settings: DemoSettings) -> None:
    """Runs lanes side by side; when one fails the others are stopped.

    Raises:
        StageError: with what the failed stage said last.
    """
    running = [start_lane(stages, root, settings) for stages in lanes]
    try:
        while any(process.poll() is None for process, _ in running):
            if any(process.poll() for process, _ in running):
                break
            time.sleep(0.2)
        for stages, (process, log) in zip(lanes, running, strict=True):
            if process.poll():
                said = log.read_text(encoding="utf-8").strip().splitlines()[-1:] or ["nothing"]
                raise StageError(f"The demo stopped at {' + '.join(stages)} (log: {log}): {said[0]}")
    finally:
        for process, _ in running:
            if process.poll() is None:
                process.kill()
                process.wait()


def reload_elsewhere(root: Path, has_package: bool) -> tuple[str, list[str]]:
    """Loads the tuned model in a new process and asks it held-out questions again.

    Args:
        has_package: whether that process imports `modeling_vlmoe`, or cannot and trusts the folder's code.

    Returns:
        The module that the model's class came from, and the answers.

    Raises:
        StageError: if it cannot be loaded there.
    """
    rows = []
    for line in (root / "data/test.jsonl").read_text(encoding="utf-8").splitlines()[:NUM_RELOADED]:
        row = json.loads(line)
        question = row["messages"][0]["content"][1]["text"]
        rows.append({"image": str(root.resolve() / "data" / row["images"][0]), "question": question})
    code = (WITH_PACKAGE if has_package else WITHOUT_PACKAGE) + RELOADED.format(
        folder=str((root / "sparse/tuned/merged").resolve()), rows=json.dumps(rows), trust=not has_package
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root)
    if done.returncode:
        raise StageError(f"The tuned model does not load in a new process: {done.stderr.strip()[-2000:]}")
    module, answers = json.loads(done.stdout.strip().splitlines()[-1])
    return module, answers


def check_reloads(root: Path, say: Callable[[str], None]) -> None:
    """The saved model gives the same answers elsewhere, with the package and without.

    Raises:
        StageError: if it does not.
    """
    from .stages import read_result

    wanted = read_result(root, "sparse")["accuracy"]["predictions"][:NUM_RELOADED]
    for has_package, how in ((True, "the Auto classes"), (False, "trust_remote_code, without the package")):
        module, answers = reload_elsewhere(root, has_package)
        if answers != wanted:
            raise StageError(f"Reloaded through {how}, the model answers otherwise than before it was saved.")
        say(f"Reloaded in a new process through {how} ({module.split('.')[0]}): {len(answers)} answers, all the same")


def sample_answers(root: Path) -> str:
    """One held-out question of each kind with its answer."""
    from .stages import read_result

    predictions = read_result(root, "sparse")["accuracy"]["predictions"]
    seen: dict[str, str] = {}
    for line, answer in zip(
        (root / "data/test.jsonl").read_text(encoding="utf-8").splitlines(), predictions, strict=True
    ):
        row = json.loads(line)
        question, truth = row["messages"][0]["content"][1]["text"], row["messages"][1]["content"][0]["text"]
        seen.setdefault(row["kind"], f"  {row['images'][0]}  {question}  {answer}  (truth: {truth})")
    return "\n".join(seen.values())


def run_demo(
    output_dir: Path, settings: DemoSettings, force: bool = False, say: Callable[[str], None] = print
) -> Path:
    """Runs the whole demo into a folder.

    Args:
        output_dir: Its folder; has to be empty or absent unless `force`.
        settings: Sizes and budgets.
        force: Whether an output folder that is not empty is emptied.
        say: Where progress and the table go.

    Returns:
        The folder, with `demo.png`, `results.txt` and the tuned model in `sparse/tuned/merged`.

    Raises:
        ValueError: if the folder is in use, or a stage stops (a parent below its gate, ...).
    """
    root = Path(output_dir)
    if root.exists() and (not root.is_dir() or any(root.iterdir())):
        if not force or not root.is_dir():
            raise ValueError(f"output_dir {root} is not empty. Name another folder, or give --force to empty it.")
        shutil.rmtree(root)
    root.mkdir(parents=True, exist_ok=True)
    began = time.perf_counter()

    def told(text: str) -> None:
        say(f"[{time.perf_counter() - began:4.0f} s] {text}")

    for lanes in PHASES:
        told("running " + " | ".join(" + ".join(stages) for stages in lanes))
        run_phase(lanes, root, settings)
    check_reloads(root, told)
    from .card import write_demo_card
    from .report import summary
    from .stages import TUNED

    write_demo_card(root, settings)

    text = summary(root)
    say(f"\nHeld-out questions and the tuned model's answers:\n{sample_answers(root)}\n\n{text}")
    (root / "results.txt").write_text(text + "\n", encoding="utf-8")
    say(f"\nPicture: {root / 'demo.png'}; model: {root / TUNED}")
    told("done")
    return root
