"""Captions as COCO scores them (1504.00325): BLEU by sacrebleu, ROUGE-L and CIDEr-D by pycocoevalcap.

COCO's own tokenizer is a Java program. Here captions are tokenised by nltk's Treebank tokenizer, which follows the
same conventions, in lower case and without the punctuation that COCO drops; scores are comparable with one another,
and with COCO's up to words that the two split unlike (abbreviations, mostly).
"""

import re
from collections.abc import Sequence
from importlib import import_module
from typing import Any

import numpy as np

from .asked import Asked

MAX_ORDER = 4
MEASURES = ("cider", "bleu1", "bleu2", "bleu3", "bleu4", "rouge_l")
SENTENCE_END = re.compile(r"(?<=[.!?])\s+")
# What COCO's tokenizer drops.
DROPPED = frozenset(
    ["''", "'", "``", "`", "(", ")", "[", "]", "{", "}", "-lrb-", "-rrb-", "-lcb-", "-rcb-"]
    + [".", "?", "!", ",", ":", "-", "--", "...", ";"]
)


def extra_module(name: str) -> Any:
    """A module of the extra `eval`.

    Raises:
        ValueError: if it is not installed.
    """
    try:
        return import_module(name)
    except ImportError as error:
        raise ValueError(
            f"Captions are scored with {name.partition('.')[0]}, which is not installed: pip install 'vlmoe[eval]'."
        ) from error


def tokenize(caption: str) -> str:
    """A caption's tokens, with a space between them.

    Raises:
        ValueError: if nltk is not installed.
    """
    tokenizer = extra_module("nltk.tokenize").TreebankWordTokenizer()
    tokens = [token for part in SENTENCE_END.split(caption) for token in tokenizer.tokenize(part.lower())]
    return " ".join(token for token in tokens if token not in DROPPED)


def _bleu_counts(prediction: str, answers: Sequence[str]) -> list[float]:
    """A caption's part of BLEU: n-grams in common and in all for n = 1 to 4, its length and the nearest answer's."""
    bleu = extra_module("sacrebleu.metrics").BLEU(tokenize="none", effective_order=True)
    score = bleu.sentence_score(prediction, list(answers))
    return [*score.counts, *score.totals, score.sys_len, score.ref_len]


def _ciders(predictions: Sequence[str], answers: Sequence[Sequence[str]]) -> np.ndarray:
    """CIDEr-D (1411.5726) of each caption, 0 to 10; how rare an n-gram is, is counted over all rows' answers."""
    scorer = extra_module("pycocoevalcap.cider.cider_scorer").CiderScorer(n=MAX_ORDER)
    for prediction, own in zip(predictions, answers, strict=True):
        scorer += (prediction, list(own))
    return np.asarray(scorer.compute_score()[1], dtype=float)


def caption_statistics(predictions: Sequence[str], asked: Sequence[Asked]) -> np.ndarray:
    """CIDEr-D, ROUGE-L and the ten counts of BLEU of each caption, (rows, 12).

    Raises:
        ValueError: if there is one row alone, among whose answers no n-gram is rarer than another, or a package of the
            extra `eval` is not installed.
    """
    if len(asked) < 2:
        raise ValueError(
            f"CIDEr weighs n-grams by how few images they are said of, which {len(asked)} rows cannot tell; give two "
            "or more."
        )
    said = [tokenize(prediction) for prediction in predictions]
    answers = [[tokenize(answer) for answer in one.answers] for one in asked]
    rouge = extra_module("pycocoevalcap.rouge.rouge").Rouge()
    rouges = [rouge.calc_score([one], own) for one, own in zip(said, answers, strict=True)]
    counts = np.array([_bleu_counts(one, own) for one, own in zip(said, answers, strict=True)], dtype=float)
    return np.column_stack([_ciders(said, answers), rouges, counts])


def bleus(counts: np.ndarray) -> np.ndarray:
    """Corpus BLEU-1 to -4 from summed counts: exp(min(0, 1 - r / c)) times the geometric mean of the precisions.

    Args:
        counts: n-grams in common and in all for n = 1 to 4, the captions' length c, the answers' r, (..., 10).
    """
    common, total, said, wanted = counts[..., :4], counts[..., 4:8], counts[..., 8], counts[..., 9]
    with np.errstate(divide="ignore", invalid="ignore"):
        logs = np.log(np.divide(common, total, out=np.zeros_like(common), where=total > 0))
        brevity = np.where(said > 0, np.minimum(0.0, 1.0 - wanted / said), -np.inf)
        means = np.cumsum(logs, axis=-1) / np.arange(1, MAX_ORDER + 1)
    return np.exp(means + brevity[..., None])


def caption_measures(sums: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """CIDEr-D, BLEU-1 to -4 and ROUGE-L over rows.

    Args:
        sums: of `caption_statistics`, (..., 12).
        counts: rows, (...).
    """
    means = sums[..., :2] / counts[..., None]
    return np.concatenate([means[..., :1], bleus(sums[..., 2:]), means[..., 1:]], axis=-1)
