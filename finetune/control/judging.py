"""What the runs of a control come to on held-out rows: the answers' negative log-likelihood, and a task's score.

Both go through the machinery of `vlmoe evaluate`: the model's column, the control's, and their difference row by row,
with its spread over seeds, or over rows drawn again where there is one seed.
"""

from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from ..arguments import FinetuneArguments
from ..collator import ChatCollator
from ..evaluate.judging import CONTROL, THIS, Judged, judge
from ..evaluate.loading import load_checkpoint
from ..evaluate.run import evaluate_checkpoints
from ..evaluate.settings import EvaluateSettings
from ..evaluate.tasks import Scoring
from ..train import load_datasets
from .settings import NO_TASK

NLL = "answer_nll"
NUM_SAMPLES = 1000
IGNORED = -100
# What says how a source is read, for who trains and who evaluates alike.
OF_DATA = ("data_format", "image_folder", "question")


def per_token(sums: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Sums of negative log-likelihoods and of tokens, (..., 2), to their ratio, (..., 1)."""
    return sums[..., :1] / sums[..., 1:]


def not_scored(answers: Any, asked: Any) -> np.ndarray:
    """What the tables' machinery would score generated answers by: nothing is generated for a likelihood."""
    raise AssertionError("a likelihood is of the rows' own answers; use answer_likelihoods")


SCORING = Scoring((NLL,), not_scored, per_token, "negative log-likelihood per token of the answers")


@torch.no_grad()
def answer_likelihoods(checkpoint: Path, rows: Any, args: FinetuneArguments) -> np.ndarray:
    """For each row, the negative log-likelihood of what the assistant says and the number of its tokens, (rows, 2)."""
    model, processor = load_checkpoint(str(checkpoint), trust_remote_code=args.trust_remote_code)
    collator, found = ChatCollator(processor, args.max_length), []
    size = args.per_device_eval_batch_size
    for first in range(0, len(rows), size):
        batch = collator([dict(rows[index]) for index in range(first, min(first + size, len(rows)))])
        inputs = {name: value.to(model.device) for name, value in batch.items()}
        labels_BT = inputs.pop("labels")[:, 1:]
        logits_BTV = model(**inputs).logits[:, :-1].float()
        losses_BT = F.cross_entropy(
            logits_BTV.transpose(1, 2), labels_BT, reduction="none", ignore_index=IGNORED
        ).double()
        num_tokens_B = (labels_BT != IGNORED).sum(1).double()
        found.append(torch.stack([losses_BT.sum(1), num_tokens_B], dim=1).cpu().numpy())
    return np.concatenate(found)


def judge_likelihoods(
    checkpoints: dict[str, list[Path]], args: FinetuneArguments
) -> tuple[Judged, dict[str, list[float]]]:
    """The answers' likelihood of every run.

    Args:
        checkpoints: by column, one per seed.
        args: of the last stage, which say what is evaluated on.

    Returns:
        The table, and each run's number.
    """
    rows = load_datasets(args)[1]
    found = {column: [answer_likelihoods(one, rows, args) for one in own] for column, own in checkpoints.items()}
    each = {column: [float(one[:, 0].sum() / one[:, 1].sum()) for one in own] for column, own in found.items()}
    return judge("answers", SCORING, found, num_samples=NUM_SAMPLES), each


def task_settings(checkpoints: dict[str, list[Path]], args: FinetuneArguments, task: str, folder: Path) -> Any:
    """What `vlmoe evaluate` is told."""
    first, *also = map(str, checkpoints[THIS])
    known = {item.name for item in fields(EvaluateSettings)}
    of_data = {name: getattr(args, name) for name in OF_DATA if name in known and hasattr(args, name)}
    source = args.data if args.eval_data is None else args.eval_data
    return EvaluateSettings(
        checkpoint=first,
        task=task,
        data=source,
        split=args.eval_split or "test",
        also=also,
        control=[str(one) for one in checkpoints[CONTROL]],
        output_dir=str(folder),
        batch_size=args.per_device_eval_batch_size,
        trust_remote_code=args.trust_remote_code,
        force=True,
        **of_data,
    )


def judge_task(
    checkpoints: dict[str, list[Path]], args: FinetuneArguments, task: str, folder: Path, say: Callable[[str], None]
) -> tuple[dict[str, Any], str]:
    """What the answers to the rows' questions are worth.

    Returns:
        The measures as `results.json` has them, and the table; nothing of both where no task is asked for.
    """
    if task == NO_TASK:
        return {}, ""
    results, table = evaluate_checkpoints(task_settings(checkpoints, args, task, folder), say)
    return results["sets"][task]["measures"], table


def columns(sparse: Sequence[Path], dense: Sequence[Path]) -> dict[str, list[Path]]:
    """The columns of both tables."""
    return {THIS: list(sparse), CONTROL: list(dense)}
