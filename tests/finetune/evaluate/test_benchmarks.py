"""The suite's prompts, and its official scoring on cases made by hand; each expected number says where it is from."""

import json
import shutil

import pytest

from modeling_vlmoe.finetune.data import open_image
from modeling_vlmoe.finetune.evaluate.asked import Asked
from modeling_vlmoe.finetune.evaluate.benchmarks import gqa, mmbench, pope, scienceqa, textvqa, vqav2
from modeling_vlmoe.finetune.evaluate.benchmarks.suites import SUITES, load_suite
from modeling_vlmoe.finetune.evaluate.settings import SUITES as SUITE_NAMES
from tests.finetune.evaluate import benchmark_files

SHORT = "Answer the question using a single word or phrase."
LETTER = "Answer with the option's letter from the given choices directly."


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return benchmark_files.make_suite(tmp_path_factory.mktemp("suite"))


def text_of(row):
    return row["messages"][0]["content"][-1]["text"]


def scores(questions, *predictions):
    """The statistics of answers, as plain lists."""
    return questions.scoring.statistics(list(predictions), questions.asked).tolist()


def measures(questions, *predictions):
    return questions.scoring.compute(questions.scoring.statistics(list(predictions), questions.asked))


# --- prompts


PROMPTS = {
    "vqav2": (vqav2, 0, f"Question 0?\n{SHORT}"),
    "gqa": (gqa, 1, f"Question 1?\n{SHORT}"),
    "textvqa": (textvqa, 0, f"What brand is 0?\nReference OCR token: NOKIA, 5.0\n{SHORT}"),
    "pope": (pope, 0, f"Is there a thing 0 in the image?\n{SHORT}"),
    "scienceqa": (scienceqa, 0, f"Which is a mammal?\nA. frog\nB. dog\n{LETTER}"),
    "mmbench": (mmbench, 1, f"It is day.\nWhere is it?\nA. left\nB. right\n{LETTER}"),
}


@pytest.mark.parametrize("name", PROMPTS)
def test_prompts_are_llavas(root, name):
    benchmark, place, prompt = PROMPTS[name]
    row = benchmark.load(root / name).rows[place]
    assert text_of(row) == prompt
    assert row["messages"][0]["content"][0]["type"] == "image"
    assert open_image(row["images"][0], "here").size == (24, 24)


def test_a_context_stands_in_front_and_no_image_is_asked_for_where_there_is_none(root):
    row = scienceqa.load(root / "scienceqa").rows[1]
    assert text_of(row) == f"Context: Look at it.\nWhat is shown?\nA. a map\nB. a poem\nC. a cell\n{LETTER}"
    assert row["images"] == []
    assert [part["type"] for part in row["messages"][0]["content"]] == ["text"]


def test_without_ocr_tokens_that_is_said(tmp_path):
    benchmark_files.textvqa(tmp_path, has_ocr=False)
    questions = textvqa.load(tmp_path)
    assert text_of(questions.rows[0]) == f"What brand is 0?\n{SHORT}"
    assert "Without OCR tokens" in questions.notes[0]


# --- scoring


@pytest.mark.parametrize(
    ("prediction", "answers", "score"),
    [
        # All people agree: their answer is compared as it is written.
        ("net", ["net"] * 10, 1.0),
        ("The net.", ["net"] * 10, 1.0),  # submitted as "net"
        ("the net", ["the net"] * 10, 0.0),  # submitted as "net", and "the net" is not normalised
        # They do not: everything is normalised. Three of ten: 7/10 * 1 + 3/10 * 2/3 = 0.9.
        ("two", ["2"] * 3 + ["three"] * 7, 0.9),
        # Seven of ten: whichever is left out, six or more are three at least.
        ("3", ["2"] * 3 + ["three"] * 7, 1.0),
        # Two of ten: left-out one of the two 1/3, else 2/3: (2 * 1/3 + 8 * 2/3) / 10 = 0.6.
        ("no", ["yes"] * 8 + ["no"] * 2, 0.6),
        # One of ten: left out 0, else 1/3: 9/10 * 1/3 = 0.3.
        ("a cat", ["cat"] + ["dog"] * 9, 0.3),
        ("bird", ["cat"] + ["dog"] * 9, 0.0),
    ],
)
def test_vqav2_is_scored_as_by_its_server(prediction, answers, score):
    assert vqav2.official_accuracy(prediction, answers) == pytest.approx(score)


def test_vqav2_reads_answers_and_their_types(root):
    questions = vqav2.load(root / "vqav2")
    assert questions.groups == {"answer type": ["other", "number", "yes/no"]}
    assert questions.ids == [42000, 42001, 42002]
    # 1 + 0.9 + 1 over 3: eight of ten said yes.
    assert measures(questions, "net", "two", "Yes")["accuracy"] == pytest.approx((1 + 0.9 + 1) / 3)


def test_gqa_is_exact_match_in_lower_case_without_a_period(root):
    questions = gqa.load(root / "gqa")
    # "Red." is red; "Yes" is yes; "on the left" is not left, and no article or word is dropped.
    assert scores(questions, "Red.", "Yes", "on the left") == [[1.0], [1.0], [0.0]]
    assert questions.groups["kind"] == ["open", "binary", "binary"]  # structural query is open, the rest binary
    assert questions.groups["structure"] == ["query", "verify", "choose"]


def test_textvqa_is_scored_as_by_its_evaluator(root):
    questions = textvqa.load(root / "textvqa")
    # All ten say nokia once in lower case; all ten say joe 's diner once normalised.
    assert scores(questions, "Nokia", "joe's diner") == [[1.0], [1.0]]
    assert scores(questions, "nokia lumia", "diner") == [[0.0], [0.0]]


def test_pope_is_scored_by_category(root):
    questions = pope.load(root / "pope")
    assert questions.groups["category"] == ["random"] * 2 + ["popular"] * 2 + ["adversarial"] * 2
    # yes/no each: random all right; popular "yes" to both; adversarial "No" to both. TP 2, FP 1, FN 1, TN 2.
    found = measures(questions, "Yes", "No", "yes", "Yes, there is", "No", "there is not one")
    assert found["accuracy"] == pytest.approx(4 / 6)
    assert found["precision"] == pytest.approx(2 / 3)
    assert found["recall"] == pytest.approx(2 / 3)
    assert found["f1"] == pytest.approx(2 / 3)
    assert found["yes_ratio"] == pytest.approx(3 / 6)


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("B", "B"),
        (" B\n", None),  # LLaVA's script turns the line's end into ". ", and "B. " with a space in front is no option
        ("B. dog", "B"),
        ("The answer is B.", "B"),
        ("1. The answer is B", "B"),
        ("C", None),  # there are two options
        ("dog", None),  # its text is not read
        ("(B)", None),
        ("b", None),
        ("", None),
    ],
)
def test_scienceqas_option_is_read_as_by_llava(text, letter):
    assert scienceqa.read_option(text, 2) == letter


def test_scienceqa_with_and_without_images(root):
    questions = scienceqa.load(root / "scienceqa")
    assert questions.ids == ["4", "5"]  # the test split alone
    assert questions.groups["image"] == ["with", "without"]
    assert questions.groups["grades"] == ["1-6", "7-12"]
    assert scores(questions, "B", "a map") == [[1.0, 0.0], [0.0, 1.0]]


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("B", "B"),
        ("B.", "B"),
        ("(C)", "C"),
        ("Answer:B", None),  # no word is the letter, and no option is named
        ("I think A is right here", None),  # A may be an article in a longer answer
        ("A dog", "A"),  # a short one's A is the letter, by the official rules
        ("it shows a dog", "B"),  # one option's text
        ("a cat or a dog", None),
        ("A or B", None),
        ("D", None),
    ],
)
def test_mmbenchs_option_is_read_by_its_rules(text, letter):
    assert mmbench.read_option(text, ["cat", "dog", "bird"]) == letter


def test_mmbench_counts_a_question_that_every_rotation_answers(root):
    questions = mmbench.load(root / "mmbench")
    assert questions.ids == [241, 252, 1000241, 1000252, 2000241]
    assert "CircularEval: right" in questions.notes[0]
    assert [one.answers[0] for one in questions.asked] == ["B", "A", "A", "B", "C"]
    # 241 right in all three passes; 252 right at first, then the same letter again, which the rotation makes wrong.
    found = measures(questions, "B", "A", "A", "A", "C")
    assert found == {"accuracy": 0.5, "first_pass": 1.0, "unread": 0.0}
    assert questions.units() == [0, 1]
    assert [groups.names for groups in questions.row_groups()] == [("identity", "position")]


def test_a_rotation_shows_its_questions_image(root):
    rows = mmbench.load(root / "mmbench").rows
    assert rows[2]["images"] == rows[0]["images"] != rows[1]["images"]


def test_mmbench_without_rotations_says_that_it_is_not_circular(tmp_path):
    benchmark_files.mmbench(tmp_path, has_rotations=False)
    questions = mmbench.load(tmp_path)
    assert "Not CircularEval" in questions.notes[0]
    assert measures(questions, "B", "what?") == {"accuracy": 0.5, "first_pass": 0.5, "unread": 0.5}


def test_a_limit_keeps_every_pass_of_a_question(root):
    limited = mmbench.load(root / "mmbench").limited(1)
    assert limited.ids == [241, 1000241, 2000241]
    assert "1 of 2 questions" in limited.notes[-1]
    assert pope.load(root / "pope").limited(3).groups["category"] == ["random", "popular", "adversarial"]


# --- refusals


def test_the_suites_of_the_command_are_those_of_the_table():
    assert set(SUITES) == set(SUITE_NAMES)


def test_sets_that_are_not_there_are_said(tmp_path):
    benchmark_files.make_suite(tmp_path, "gqa", "mmbench")
    sets, missing = load_suite("llava", str(tmp_path))
    assert [one.name for one in sets] == ["GQA", "MMBench"]
    assert set(missing) == {"VQAv2", "TextVQA", "POPE", "ScienceQA"}
    assert str(tmp_path / "pope") in missing["POPE"]


@pytest.mark.parametrize(
    ("name", "lacking", "said"),
    [
        ("vqav2", "v2_mscoco_val2014_annotations.json", "VQAv2 .* incomplete: there is no v2_mscoco"),
        ("vqav2", "val2014/COCO_val2014_000000000043.jpg", "1 of 3 images are not there"),
        ("gqa", "images", "GQA is incomplete: 3 of 3 images"),
        ("textvqa", "TextVQA_0.5.1_val.json", "TextVQA .* incomplete"),
        ("pope", "coco_pope_popular.json", "there is no coco_pope_popular.json"),
        ("scienceqa", "pid_splits.json", "there is no pid_splits.json"),
        ("scienceqa", "images/test/4/image.png", "1 of 1 images"),
        ("mmbench", "mmbench_dev_20230712.tsv", "expected one .tsv file, found none"),
    ],
)
def test_raises_when_a_benchmark_is_incomplete(root, tmp_path, name, lacking, said):
    shutil.copytree(root / name, tmp_path / name)
    place = tmp_path / name / lacking
    shutil.rmtree(place) if place.is_dir() else place.unlink()
    with pytest.raises(ValueError, match=said):
        load_suite("llava", str(tmp_path))


def edit(path, change):
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


BROKEN = {
    "vqav2/v2_mscoco_val2014_annotations.json": (
        lambda value: value["annotations"].pop(),
        "there is no annotation of question 42002",
    ),
    "gqa/testdev_balanced_questions.json": (
        lambda value: value["201022280"].pop("types"),
        "question 201022280: types is null, expected dict",
    ),
    "textvqa/TextVQA_0.5.1_val.json": (lambda value: value["data"][1]["answers"].pop(), "has 9 answers"),
    "textvqa/TextVQA_Rosetta_OCR_v0.2_val.json": (lambda value: value["data"].pop(), "no tokens of the image 001f"),
    "scienceqa/pid_splits.json": (lambda value: value["test"].append("9"), "problem 9: 9 is null, expected dict"),
    "scienceqa/problems.json": (lambda value: value["4"].update(answer=7), "the answer is 7 of 2 choices"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_raises_when_a_file_is_not_in_its_schema(root, tmp_path, name):
    change, said = BROKEN[name]
    folder = name.split("/")[0]
    shutil.copytree(root / folder, tmp_path / folder)
    edit(tmp_path / name, change)
    with pytest.raises(ValueError, match=said):
        load_suite("llava", str(tmp_path))


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("pope/coco_pope_random.json", '{"question_id": 1, "image": "x", "text": "?", "label": "perhaps"}', "perhaps"),
        ("pope/coco_pope_random.json", "{", "line 1 is not valid JSON"),
        ("gqa/testdev_balanced_questions.json", "[]", "no mapping of questions"),
        ("gqa/testdev_balanced_questions.json", "{", "is not valid JSON"),
        ("gqa/testdev_balanced_questions.json", "{}", "holds no questions"),
        ("mmbench/mmbench_dev_20230712.tsv", "index\tquestion\n1\tx\n", "has no column A, B, answer, image"),
        (
            "mmbench/mmbench_dev_20230712.tsv",
            "index\tquestion\tA\tB\tanswer\timage\n1\tx\ta\tb\tA\t!\n",
            "not base64",
        ),
        (
            "mmbench/mmbench_dev_20230712.tsv",
            "index\tquestion\tA\tB\tanswer\timage\n1\tx\ta\tb\tC\tAAAA\n",
            "the answer is 'C' of 2 options",
        ),
    ],
)
def test_raises_when_a_file_holds_something_else(root, tmp_path, name, text, said):
    folder = name.split("/")[0]
    shutil.copytree(root / folder, tmp_path / folder)
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=said):
        load_suite("llava", str(tmp_path))


def test_raises_when_there_is_nothing_of_the_suite(tmp_path):
    with pytest.raises(ValueError, match="holds none of the suite's folders"):
        load_suite("llava", str(tmp_path))
    with pytest.raises(ValueError, match="is no folder; name the one"):
        load_suite("llava", str(tmp_path / "nothing"))


def test_passes_of_unlike_questions_are_kept_apart():
    asked = [Asked(("A",), ("x", "y"), "1"), Asked(("B",), ("x", "y"), "2"), Asked(("A",), ("y", "x"), "1")]
    assert mmbench.statistics(["A", "B", "B"], asked).tolist() == [[0.0, 1.0, 0.0], [1.0, 1.0, 0.0]]
