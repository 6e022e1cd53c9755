"""VQA's official answer normalisation and soft accuracy (1505.00468, 1612.00837, and the evaluation server's code).

>>> normalize_vqa("The 2 dogs, isnt it?")
"2 dogs isn't it"
>>> soft_accuracy("red", ["red"] * 3 + ["blue"] * 7)  # three said red: of the ten sets of nine, seven hold all three
0.9
"""

import re
from collections import Counter
from collections.abc import Sequence

import numpy as np

from ..metrics import ARTICLES, NUMBERS
from .asked import Asked

FEWEST = 4  # answers by which min(1, matches / 3) over all but one of them can reach 1
MARKS = ';/[]"{}()=+\\_-><@`,?!'
NUMBER_WITH_COMMA = re.compile(r"\d,\d")
LOOSE_PERIOD = re.compile(r"\.(?!\d)")
MAX_PERIODS = 32  # the server's code passes re.UNICODE, which is 32, where `count` stands
# A word that has lost one of its apostrophes gets it back; the list is the server's.
CONTRACTED = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've he's
how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've o'clock
oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd
someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've there're there's
they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's what've when's
where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't wouldn't've
y'all y'all'll y'all'd've you'd you'd've you'll you're you've
"""
CONTRACTIONS = {
    word[:place] + word[place + 1 :]: word
    for word in CONTRACTED.split()
    for place, letter in enumerate(word)
    if letter == "'"
} | {"somebody'd": "somebodyd"}  # the one that the server's list has the other way round


def strip_punctuation(text: str) -> str:
    """Marks go where a space is beside one of their kind or a number has a comma, else they become spaces."""
    has_comma = NUMBER_WITH_COMMA.search(text) is not None
    stripped = text
    for mark in MARKS:
        is_loose = has_comma or f"{mark} " in text or f" {mark}" in text
        stripped = stripped.replace(mark, "" if is_loose else " ")
    return LOOSE_PERIOD.sub("", stripped, count=MAX_PERIODS)


def strip_words(text: str) -> str:
    """Lower case, number words as digits, no articles, apostrophes where contractions have lost theirs."""
    words = [NUMBERS.get(word, word) for word in text.lower().split()]
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def normalize_vqa(text: str) -> str:
    """An answer as VQAv2's server compares it."""
    return strip_words(strip_punctuation(text.replace("\n", " ").replace("\t", " ").strip()))


def normalize_submission(text: str) -> str:
    """An answer as TextVQA's evaluator compares it, and as LLaVA-1.5 submits it to VQAv2's server."""
    return normalize_vqa(text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip())


def soft_accuracy(answer: str, answers: Sequence[str]) -> float:
    """Acc(a) = the mean, over all sets of the people but one, of min(1, number of them who said a / 3).

    With fewer than four people no answer could reach 1; it is right then when one of them said it.

    Args:
        answer: the model's, normalised.
        answers: the people's, normalised.
    """
    if len(answers) < FEWEST:
        return float(answer in answers)
    num_same = sum(one == answer for one in answers)
    without = [num_same - (one == answer) for one in answers]
    return sum(min(1.0, same / 3) for same in without) / len(answers)


def is_most_frequent(answer: str, answers: Sequence[str]) -> bool:
    """Whether no other answer was given more often."""
    counts = Counter(answers)
    return counts[answer] == max(counts.values())


def vqa_statistics(predictions: Sequence[str], asked: Sequence[Asked]) -> np.ndarray:
    """Soft accuracy, and whether the answer is the people's most frequent one, (rows, 2)."""
    found = []
    for prediction, one in zip(predictions, asked, strict=True):
        answer, answers = normalize_vqa(prediction), [*map(normalize_vqa, one.answers)]
        found.append((soft_accuracy(answer, answers), float(is_most_frequent(answer, answers))))
    return np.array(found, dtype=float).reshape(-1, 2)
