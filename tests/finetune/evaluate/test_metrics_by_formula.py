"""Each metric against its paper's formula, written out here in the plainest way, and against other libraries."""

import itertools
import math
import random
from collections import Counter

import evaluate
import numpy as np
import pytest
from sklearn.metrics import accuracy_score, f1_score, precision_score, recall_score

from modeling_vlmoe.finetune.evaluate.anls import edit_distance
from modeling_vlmoe.finetune.evaluate.captions import tokenize
from modeling_vlmoe.finetune.evaluate.multiple_choice import read_letter
from modeling_vlmoe.finetune.evaluate.offline_metrics import METRICS, metric, metric_path
from modeling_vlmoe.finetune.evaluate.settings import TASK_NAMES
from modeling_vlmoe.finetune.evaluate.tasks import TASKS
from modeling_vlmoe.finetune.evaluate.vqa_answers import (
    CONTRACTIONS,
    normalize_submission,
    normalize_vqa,
    soft_accuracy,
)
from modeling_vlmoe.finetune.evaluate.yes_no import says_yes

CAPTIONS = [
    ("a man rides a horse on a beach", ["A man riding a horse on the beach.", "someone rides a brown horse"]),
    ("a cat sits on a mat", ["The cat sat on the mat.", "a cat is sitting on a red mat", "a cat on a mat"]),
    ("two dogs", ["Two dogs play with a ball in the park.", "dogs playing"]),
    ("a plate of food on a table", ["a table with a plate of food on it", "food on a plate"]),
]


# --- VQA


def accuracy_by_subsets(answer, answers):
    """1505.00468: the mean over all sets of nine of the ten people of min(1, people who said it / 3)."""
    scores = [min(1, nine.count(answer) / 3) for nine in itertools.combinations(answers, len(answers) - 1)]
    return sum(scores) / len(scores)


@pytest.mark.parametrize("num_same", range(11))
def test_soft_accuracy_is_the_mean_over_all_sets_of_nine_people(num_same):
    answers = ["red"] * num_same + [f"other {place}" for place in range(10 - num_same)]
    assert soft_accuracy("red", answers) == pytest.approx(accuracy_by_subsets("red", answers))


def test_soft_accuracy_of_three_in_ten_is_nine_tenths():
    # Seven of the ten sets of nine hold all three (1), three hold two of them (2/3): 7/10 + 3/10 * 2/3 = 0.9.
    assert soft_accuracy("red", ["red"] * 3 + ["blue"] * 7) == pytest.approx(0.9)


def test_a_right_answer_of_few_people_counts_in_full():
    assert [soft_accuracy("red", answers) for answers in (["red"], ["red", "blue"], ["blue"])] == [1.0, 1.0, 0.0]


@pytest.mark.parametrize(
    ("given", "normal"),
    [
        ("The red car.", "red car"),  # article and period
        ("two dogs", "2 dogs"),  # number word
        ("none", "0"),
        ("dont know", "don't know"),  # apostrophe given back
        ("couldnt've", "couldn't've"),
        ("somebody'd", "somebodyd"),  # the one entry of the server's list that goes the other way
        ("top-left", "top left"),  # a mark without a space beside it becomes one
        ("yes, it is", "yes it is"),  # a mark with a space beside it goes
        ("1,000-2,000", "10002000"),  # a comma in a number: every mark goes
        ("2.5", "2.5"),
        ("5.", "5"),
        ("a\nb", "b"),
        ("-5", " 5".strip()),
    ],
)
def test_answers_are_normalised_as_by_vqas_server(given, normal):
    assert normalize_vqa(given) == normal


def test_what_is_submitted_loses_commas_and_parts_the_genitive():
    # TextVQA's evaluator first drops commas and question marks and writes 's apart.
    assert normalize_submission("Joe's Diner, 1,000?") == "joe 's diner 1000"


def test_every_contraction_lacks_one_apostrophe():
    for short, full in CONTRACTIONS.items():
        if short == "somebody'd":
            continue
        assert short.replace("'", "") == full.replace("'", "")
        assert full.count("'") == short.count("'") + 1


def test_exact_is_the_most_frequent_answer():
    result = metric("vqa").compute(
        predictions=["red", "blue", "Two."],
        references=[["red", "red", "blue"], ["red", "red", "blue"], ["2", "2", "3"]],
    )
    assert result == {"soft_accuracy": pytest.approx(1.0), "exact": pytest.approx(2 / 3), "count": 3}


# --- ANLS


def levenshtein(first, second):
    """By its definition: recursion without a table."""
    if not first or not second:
        return len(first) + len(second)
    same = levenshtein(first[1:], second[1:])
    if first[0] == second[0]:
        return same
    return 1 + min(same, levenshtein(first[1:], second), levenshtein(first, second[1:]))


def test_edit_distance_is_levenshteins():
    draw = random.Random(0)
    for _ in range(60):
        first, second = ("".join(draw.choices("ab c", k=draw.randint(0, 6))) for _ in range(2))
        assert edit_distance(first, second) == levenshtein(first, second)


def test_anls_is_the_papers_formula():
    # 1 - NL of the nearest answer, 0 where NL > 0.5: hello/helo 1 - 1/5; abcd/abxy NL = 2/4, at the threshold; Paris
    # in another case 1; dog/cat NL = 1.
    rows = [("helo", ["hello", "bye"], 0.8), ("abcd", ["abxy"], 0.5), (" PARIS ", ["paris"], 1.0), ("dog", ["cat"], 0)]
    result = metric("anls").compute(
        predictions=[given for given, _, _ in rows], references=[answers for _, answers, _ in rows]
    )
    assert result["anls"] == pytest.approx(sum(score for _, _, score in rows) / len(rows))


# --- yes or no


def test_yes_no_measures_are_scikit_learns():
    draw = random.Random(1)
    said, right = ([draw.choice(["yes", "no"]) for _ in range(50)] for _ in range(2))
    result = metric("yes-no").compute(predictions=said, references=right)
    assert result["accuracy"] == pytest.approx(accuracy_score(right, said))
    assert result["precision"] == pytest.approx(precision_score(right, said, pos_label="yes"))
    assert result["recall"] == pytest.approx(recall_score(right, said, pos_label="yes"))
    assert result["f1"] == pytest.approx(f1_score(right, said, pos_label="yes"))
    assert result["yes_ratio"] == pytest.approx(said.count("yes") / 50)


@pytest.mark.parametrize(
    ("text", "is_yes"),
    [
        ("Yes", True),
        ("No", False),
        ("no, there is none", False),
        ("There is not a dog", False),
        ("Yes. There is no cat", True),  # the first sentence alone
        ("A dog", True),  # whatever does not deny
        ("", True),
        ("NO", True),  # POPE's list of words has No, no and not
    ],
)
def test_an_answer_is_no_by_popes_rule(text, is_yes):
    assert says_yes(text) is is_yes


def test_nothing_called_yes_gives_zero_and_no_error():
    result = metric("yes-no").compute(predictions=["no", "no"], references=["no", "no"])
    assert (result["accuracy"], result["precision"], result["recall"], result["f1"]) == (1.0, 0.0, 0.0, 0.0)


# --- multiple choice


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("B", "B"),
        ("(b)", "B"),
        ("B.", "B"),
        ("B. a dog", "B"),
        ("The answer is C", "C"),
        ("the answer is: (a)", "A"),
        ("A dog!", "B"),
        ("D", None),
        ("a bird or a dog", None),
        ("", None),
    ],
)
def test_letters_are_read(text, letter):
    assert read_letter(text, ["cat", "dog", "bird"]) == letter


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("The answer is a dog", "C"),  # as it is written, before "dog"
        ("The answer is dog.", "B"),
        ("the answer is a", "A"),
        ("the answer is a.", "A"),
        ("The answer is an owl", "D"),
        ("The answer is a frog", None),  # an article
        ("The answer is B because it barks", "B"),
        ("a dog", "C"),
    ],
)
def test_an_article_is_no_letter(text, letter):
    assert read_letter(text, ["cat", "dog", "a dog", "owl"]) == letter


def test_multiple_choice_counts_right_and_unread():
    result = metric("multiple-choice").compute(
        predictions=["A", "dog", "who knows", "C"],
        references=["A", "B", "cat", "B"],
        choices=[["cat", "dog", "bird"]] * 4,
    )
    assert result == {"accuracy": 0.5, "unread": 0.25, "count": 4}


# --- captions


def ngrams(text, order):
    words = text.split()
    return Counter(tuple(words[place : place + order]) for place in range(len(words) - order + 1))


def bleu_by_formula(said, answers, order):
    """Papineni et al. 2002: exp(min(0, 1 - r / c)) exp(mean of log p_n), counts clipped by one answer's largest."""
    precisions = []
    for size in range(1, order + 1):
        common = total = 0
        for one, own in zip(said, answers, strict=True):
            most = Counter()
            for answer in own:
                most |= ngrams(answer, size)
            common += sum((ngrams(one, size) & most).values())
            total += sum(ngrams(one, size).values())
        precisions.append(common / total)
    length = sum(len(one.split()) for one in said)
    nearest = sum(
        min((abs(len(answer.split()) - len(one.split())), len(answer.split())) for answer in own)[1]
        for one, own in zip(said, answers, strict=True)
    )
    mean = sum(map(math.log, precisions)) / order if all(precisions) else -math.inf
    return math.exp(min(0, 1 - nearest / length) + mean)


def cider_by_formula(said, answers, sigma=6.0):
    """CIDEr-D, 1411.5726: 10 / 4 times the sum over n of the mean over answers of the clipped cosine of tf-idf
    vectors, times exp(-(difference of lengths)^2 / 2 sigma^2).
    """
    found = []
    for one, own in zip(said, answers, strict=True):
        total = 0.0
        for order in range(1, 5):
            seen = Counter(gram for refs in answers for gram in set().union(*(ngrams(ref, order) for ref in refs)))

            def vector(text, order=order, seen=seen):
                return {g: c * math.log(len(said) / max(1, seen[g])) for g, c in ngrams(text, order).items()}

            given = vector(one)
            for answer in own:
                wanted = vector(answer)
                product = sum(min(given[g], wanted.get(g, 0)) * wanted.get(g, 0) for g in given)
                norms = math.hypot(*given.values()) * math.hypot(*wanted.values())
                bigrams = sum(ngrams(one, 2).values()) - sum(ngrams(answer, 2).values())
                penalty = math.exp(-(bigrams**2) / (2 * sigma**2))
                total += penalty * (product / norms if norms else 0) / len(own)
        found.append(10 * total / 4)
    return sum(found) / len(found)


def rouge_by_formula(said, answers, beta=1.2):
    """Lin 2004: (1 + b^2) R P / (R + b^2 P), of the best recall and precision of the longest common subsequence."""

    def common(first, second):
        if not first or not second:
            return 0
        if first[0] == second[0]:
            return 1 + common(first[1:], second[1:])
        return max(common(first[1:], second), common(first, second[1:]))

    scores = []
    for one, own in zip(said, answers, strict=True):
        pairs = [(common(one.split(), ref.split()), len(ref.split())) for ref in own]
        precision = max(same / len(one.split()) for same, _ in pairs)
        recall = max(same / length for same, length in pairs)
        scores.append((1 + beta**2) * recall * precision / (recall + beta**2 * precision) if precision else 0)
    return sum(scores) / len(scores)


@pytest.fixture(scope="module")
def scored():
    said, answers = zip(*CAPTIONS, strict=True)
    tokens = [tokenize(one) for one in said], [[tokenize(answer) for answer in own] for own in answers]
    return metric("caption").compute(predictions=list(said), references=list(answers)), *tokens


def test_bleu_is_its_formula_and_cocos(scored):
    from pycocoevalcap.bleu.bleu import Bleu

    result, said, answers = scored
    given = {place: [one] for place, one in enumerate(said)}
    coco, _ = Bleu(4).compute_score(dict(enumerate(answers)), given, verbose=0)
    for order in range(1, 5):
        assert result[f"bleu{order}"] == pytest.approx(bleu_by_formula(said, answers, order))
        assert result[f"bleu{order}"] == pytest.approx(coco[order - 1], abs=1e-6)
    assert 0 < result["bleu4"] < result["bleu1"] < 1


def test_cider_is_its_formula(scored):
    result, said, answers = scored
    assert result["cider"] == pytest.approx(cider_by_formula(said, answers))
    assert result["cider"] > 0.5


def test_rouge_is_its_formula(scored):
    result, said, answers = scored
    assert result["rouge_l"] == pytest.approx(rouge_by_formula(said, answers))


def test_captions_are_tokenised_without_punctuation_and_capitals():
    assert tokenize('A man\'s dog, "Rex" (brown), sits. It waits!') == "a man 's dog rex brown sits it waits"


def test_an_empty_caption_scores_nothing():
    result = metric("caption").compute(predictions=["", "a cat"], references=[["a dog"], ["a cat"]])
    assert np.isfinite(list(result.values())).all()
    assert metric("caption").compute(predictions=["", ""], references=[["a dog"], ["a cat"]])["bleu1"] == 0.0


# --- as metrics of evaluate


def test_every_task_is_a_metric_and_a_choice_of_the_command():
    assert set(METRICS) == set(TASKS) == set(TASK_NAMES)


@pytest.mark.parametrize("task", TASK_NAMES)
def test_evaluate_loads_each_metric_without_a_network(task):
    loaded = evaluate.load(metric_path(task))
    assert isinstance(loaded, evaluate.Metric)
    assert loaded.task == task
    given = {"predictions": ["a cat", "a dog"], "references": [["a cat"], ["a dog"]]}
    if task in ("yes-no", "multiple-choice"):
        given = {"predictions": ["no", "yes"], "references": ["no", "yes"]}
        given = given if task == "yes-no" else {"predictions": ["A", "B"], "references": ["A", "B"]}
    assert loaded.compute(**given) == metric(task).compute(**given)


def test_metrics_combine_and_take_batches():
    both = evaluate.combine([metric("vqa"), metric("anls")])
    result = both.compute(predictions=["helo"], references=[["hello"]])
    assert (result["exact"], result["anls"]) == (0.0, 0.8)
    batched = metric("anls")
    batched.add_batch(predictions=["helo"], references=[["hello", "hi"]])
    batched.add_batch(predictions=["x"], references=[["x", "y"]])
    assert batched.compute() == {"anls": pytest.approx(0.9), "count": 2}


@pytest.mark.parametrize(
    ("task", "given", "said"),
    [
        ("yes-no", {"predictions": ["yes"], "references": ["maybe"]}, "Reference 0: .*'maybe'; expected yes or no"),
        ("multiple-choice", {"predictions": ["A"], "references": ["many words"]}, "Reference 0: .* expected a letter"),
        ("multiple-choice", {"predictions": ["A"], "references": ["A"], "choices": []}, "choices has 0 entries"),
        ("caption", {"predictions": ["a"], "references": [["a"]]}, "give two or more"),
        ("vqa", {"predictions": ["a"], "references": [[]]}, "Reference 0 is empty; give one text at least"),
    ],
)
def test_raises_when_references_are_of_the_wrong_kind(task, given, said):
    with pytest.raises(ValueError, match=said):
        metric(task).compute(**given)


@pytest.mark.parametrize("task", TASK_NAMES)
def test_raises_when_there_are_no_answers(task):
    with pytest.raises(ValueError, match="predictions is empty, so there are no answers to score; give one or more"):
        metric(task).compute(predictions=[], references=[])


def test_raises_when_there_is_no_such_task():
    with pytest.raises(ValueError, match="no task 'iou'; choose one of vqa, caption"):
        metric("iou")


def test_raises_when_the_extra_is_not_installed(monkeypatch):
    from modeling_vlmoe.finetune.evaluate import captions

    monkeypatch.setitem(__import__("sys").modules, "nltk.tokenize", None)
    with pytest.raises(ValueError, match=r"nltk, which is not installed: pip install 'vlmoe\[eval\]'"):
        captions.tokenize("a cat")
