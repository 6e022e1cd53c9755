"""A recipe with its dense control, top to bottom: both chains under every seed, what they saw, what they come to.

Every run is a chain, so that what is finished is kept and what was interrupted goes on.
"""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from modeling_vlmoe.model_cards import write_card

from ..chain.processes import is_main, on_main
from ..chain.recipe import OF_CHAIN, parse_chain
from ..chain.run import run_chain
from ..chain.stages import STAGES, Chain
from .arms import FOLDER, Pair, build_pairs, last_training
from .judging import columns, judge_likelihoods, judge_task
from .matching import Counts, check_one_schedule, match_flops
from .report import describe_pairs, difference_words, write_report
from .same_tokens import check_processes, check_same_tokens
from .seen_batches import record_batches
from .settings import CONTROL_NAME, FLOPS, ControlSettings
from .tables import control_table

EVALUATION = "evaluation"


def chain_of_one(name: str, values: Mapping[str, Any], origin: str) -> Chain:
    """A recipe of one stage as a chain, which a control is trained beside.

    Args:
        name: of the recipe.
        values: its settings.
        origin: what messages call it.

    Raises:
        ValueError: naming the key or the value that is wrong.
    """
    stage = re.sub(r"\W+", "-", name).strip("-")
    top = {key: value for key, value in values.items() if key in OF_CHAIN}
    own = {key: value for key, value in values.items() if key not in OF_CHAIN}
    return parse_chain({**top, STAGES: {stage if stage[:1].isalpha() else f"run-{stage}": own}}, {}, origin)


def run_pair(
    pair: Pair, control: ControlSettings, folder: Path, say: Callable[[str], None] | None
) -> tuple[Pair, Counts]:
    """Trains both, the sparse model first, and checks that they saw the same.

    Returns:
        The pair as it was trained, and what its steps cost where that was counted.

    Raises:
        ValueError: for whatever the user can mend.
    """
    counts: Counts = {}
    run_chain(pair.sparse, say, [record_batches])
    on_main(lambda: check_processes(pair))
    if control.control_match == FLOPS:
        pair, counts = match_flops(pair, folder, say)
    run_chain(pair.dense, say, [record_batches])
    on_main(lambda: check_same_tokens(pair, is_matched=control.control_match == FLOPS))
    return pair, counts


def run_with_control(chain: Chain, control: ControlSettings, say: Callable[[str], None] | None = None) -> str:
    """Trains a recipe's model and its dense control, measures both, and writes the difference beside the model.

    Args:
        chain: the recipe.
        control: how it is compared.
        say: takes lines on what is under way.

    Returns:
        The tables and the difference in words.

    Raises:
        ValueError: for whatever the user can mend, before anything is trained where it can be known.
    """
    said = say if say is not None and is_main() else None
    pairs: list[Pair] = build_pairs(chain, control)
    if control.control_match == FLOPS:
        for pair in pairs:
            check_one_schedule(pair)
    folder = chain.output_dir / FOLDER
    done = []
    for pair in pairs:
        if said is not None:
            said(f"seed {pair.seed}: the sparse model, then its dense control")
        done.append(run_pair(pair, control, folder, said))
    return on_main(lambda: report([pair for pair, _ in done], [counts for _, counts in done], control, folder, said))


def report(
    pairs: list[Pair],
    counts: list[Counts],
    control: ControlSettings,
    folder: Path,
    say: Callable[[str], None] | None,
) -> str:
    """Measures the runs, writes what was found beside the first sparse model and into its card, and says it."""
    main = pairs[0].sparse
    last = last_training(main)
    assert last is not None
    args = main.arguments(last)
    checkpoints = columns([pair.sparse.result for pair in pairs], [pair.dense.result for pair in pairs])
    likelihoods, each = judge_likelihoods(checkpoints, args)
    tell = say if say is not None else lambda text: None
    measures, task_table = judge_task(checkpoints, args, control.control_task, folder / EVALUATION, tell)
    found = describe_pairs(pairs, counts, control, args, likelihoods, each, measures)
    write_report(main.result, found)
    write_card(main.result)
    text = [control_table(found), difference_words(found), f"in full: {main.result / CONTROL_NAME}"]
    if task_table:
        text.append(f"by task: {folder / EVALUATION}")
    return "\n".join([*text, f"{main.result}: done; its control in {folder}"])
