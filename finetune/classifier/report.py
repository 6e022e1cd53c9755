"""What all runs found, as tables in Markdown: accuracies with their spread over seeds, and how tasks are routed."""

from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from .stages import DENSE, SPARSE, read_result

Table = list[list[str]]


def markdown(rows: Table) -> str:
    """A table, of which the first row is the head."""
    head, *body = rows
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *body])


def spread(values: Sequence[float]) -> str:
    """The mean, the standard deviation over seeds, and the lowest."""
    if len(values) == 1:
        return f"{values[0]:.4f}"
    return f"{mean(values):.4f} ± {stdev(values):.4f}, lowest {min(values):.4f}"


def pooled(accuracy: dict[str, dict[str, float]]) -> float:
    """The accuracy over all rows of all tasks."""
    right = sum(share["accuracy"] * share["count"] for share in accuracy.values())
    return right / sum(share["count"] for share in accuracy.values())


def accuracy_rows(results: dict[str, Any]) -> Table:
    """One row per contestant, one column per task."""
    tasks = results["tasks"]
    rows = [["accuracy", *tasks, "all", "parameters"]]
    for name, runs in results["accuracy"].items():
        columns = [[run[task]["accuracy"] for run in runs] for task in tasks] + [[pooled(run) for run in runs]]
        parameters = results["parameters"].get(name)
        rows.append([name, *map(spread, columns), f"{parameters:,}" if parameters else ""])
    return rows


def load_rows(routing: dict[str, Any]) -> Table:
    """One row per layer and task: the experts' shares of the task's image tokens."""
    layers = routing["layers"]
    most = max(len(shares) for layer in layers.values() for shares in layer["load"].values())
    rows = [["layer", "task", *(f"expert {expert}" for expert in range(most))]]
    for name, layer in layers.items():
        for task, shares in layer["load"].items():
            rows.append([name, task, *(f"{share:.3f}" for share in shares)])
    return rows


def divergence_rows(routings: dict[int, dict[str, Any]]) -> Table:
    """One row per layer: how far the tasks' loads differ, for each seed."""
    rows = [["divergence, bits", *(f"seed {seed}" for seed in routings)]]
    for name in next(iter(routings.values()))["layers"]:
        bits = [routing["layers"][name]["divergence_bits"] for routing in routings.values()]
        rows.append([name, *(f"{value:.3f}" for value in bits)])
    return rows


def collect(root: Path, seeds: Sequence[int], has_controls: bool) -> dict[str, Any]:
    """The seeds' results by contestant.

    Args:
        root: the command's folder.
        seeds: of the runs.
        has_controls: whether there is a dense control.

    Returns:
        `accuracy`: for each contestant each seed's accuracies by task; `parameters`, `seconds` and `routing`.
    """
    stages = ([DENSE] if has_controls else []) + [SPARSE]
    found: dict[str, Any] = {"accuracy": {}, "parameters": {}, "seconds": {}}
    for stage in stages:
        runs = [read_result(root, seed, stage) for seed in seeds]
        name = "dense, same epochs" if stage == DENSE else SPARSE
        found["accuracy"][name] = [run["accuracy"] for run in runs]
        found["parameters"][name] = runs[0]["parameters"]
        found["seconds"][name] = [run["seconds"] for run in runs]
        if all("silent" in run for run in runs):
            found["accuracy"]["sparse, its text gates silent"] = [run["silent"] for run in runs]
    found["routing"] = {seed: read_result(root, seed, SPARSE)["routing"] for seed in seeds}
    return found


def summary(results: dict[str, Any]) -> str:
    """All that was found, as Markdown."""
    routing = results["routing"]
    first = next(iter(routing))
    seeds = ", ".join(map(str, routing))
    return "\n\n".join(
        [
            f"{results['num_train']} training rows, {results['num_test']} test rows of {results['num_test_images']} "
            f"images that nothing was trained on. Seeds {seeds}: mean ± standard deviation, lowest.",
            markdown(accuracy_rows(results)),
            f"Share of each task's image tokens by expert, seed {first}:",
            markdown(load_rows(routing[first])),
            f"How far the tasks differ, of at most {routing[first]['most_bits']:.3f} bits "
            "(0: routed alike, as without a text gate):",
            markdown(divergence_rows(routing)),
        ]
    )
