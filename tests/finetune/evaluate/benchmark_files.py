"""Tiny benchmarks in the public sets' own schema: the same files, fields and folders, with pictures drawn here."""

import base64
import csv
import json
from io import BytesIO

from PIL import Image

COLOURS = ("red", "green", "blue")


def picture(path, colour="red"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (24, 24), colour).save(path)


def write(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def vqav2(folder):
    """Three questions: people agree, people do not, yes or no."""
    people = [["net"] * 10, ["2"] * 3 + ["three"] * 7, ["yes"] * 8 + ["no"] * 2]
    types = ["other", "number", "yes/no"]
    questions = [
        {"image_id": 42 + place, "question": f"Question {place}?", "question_id": 42000 + place} for place in range(3)
    ]
    annotations = [
        {
            "question_type": "what is",
            "multiple_choice_answer": own[0],
            "answers": [
                {"answer": answer, "answer_confidence": "yes", "answer_id": number + 1}
                for number, answer in enumerate(own)
            ],
            "image_id": 42 + place,
            "answer_type": types[place],
            "question_id": 42000 + place,
        }
        for place, own in enumerate(people)
    ]
    head = {"info": {}, "license": {}, "data_type": "mscoco", "data_subtype": "val2014"}
    write(folder / "v2_OpenEnded_mscoco_val2014_questions.json", head | {"questions": questions})
    write(folder / "v2_mscoco_val2014_annotations.json", head | {"annotations": annotations})
    for place, colour in enumerate(COLOURS):
        picture(folder / "val2014" / f"COCO_val2014_{42 + place:012d}.jpg", colour)


def gqa(folder):
    types = [("query", "attr"), ("verify", "obj"), ("choose", "rel")]
    answers = ["red", "yes", "left"]
    questions = {
        f"20102228{place}": {
            "semantic": [],
            "entailed": [],
            "equivalent": [],
            "question": f"Question {place}?",
            "imageId": f"n{place}",
            "isBalanced": True,
            "groups": {"global": None, "local": "06-x"},
            "answer": answer,
            "semanticStr": "",
            "annotations": {},
            "types": {"detailed": "x", "semantic": semantic, "structural": structural},
            "fullAnswer": "",
        }
        for place, (answer, (structural, semantic)) in enumerate(zip(answers, types, strict=True))
    }
    write(folder / "testdev_balanced_questions.json", questions)
    for place, colour in enumerate(COLOURS):
        picture(folder / "images" / f"n{place}.jpg", colour)


def textvqa(folder, has_ocr=True):
    people = [["nokia"] * 8 + ["Nokia"] * 2, ["Joe's Diner"] * 5 + ["joe's diner."] * 5]
    questions = [
        {
            "question": f"what brand is {place}?",
            "image_id": f"00{place}f",
            "image_classes": [],
            "flickr_original_url": "",
            "image_width": 24,
            "image_height": 24,
            "answers": own,
            "question_tokens": [],
            "question_id": 34602 + place,
            "set_name": "val",
        }
        for place, own in enumerate(people)
    ]
    head = {"dataset_type": "val", "dataset_name": "textvqa", "dataset_version": "0.5.1"}
    write(folder / "TextVQA_0.5.1_val.json", head | {"data": questions})
    if has_ocr:
        words = [["NOKIA", "5.0"], []]
        ocr = [
            {"image_id": f"00{place}f", "ocr_info": [{"word": word, "bounding_box": {}} for word in own]}
            for place, own in enumerate(words)
        ]
        write(folder / "TextVQA_Rosetta_OCR_v0.2_val.json", head | {"data": ocr})
    for place in range(2):
        picture(folder / "train_images" / f"00{place}f.jpg", COLOURS[place])


def pope(folder):
    for category in ("random", "popular", "adversarial"):
        lines = [
            {
                "question_id": place + 1,
                "image": "COCO_val2014_000000310196.jpg",
                "text": f"Is there a thing {place} in the image?",
                "label": label,
            }
            for place, label in enumerate(["yes", "no"])
        ]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"coco_pope_{category}.json").write_text("\n".join(map(json.dumps, lines)) + "\n")
    picture(folder / "val2014" / "COCO_val2014_000000310196.jpg")


def scienceqa(folder):
    common = {"task": "closed choice", "topic": "x", "category": "x", "skill": "x", "lecture": "", "solution": ""}
    problems = {
        "4": {
            "question": "Which is a mammal?",
            "choices": ["frog", "dog"],
            "answer": 1,
            "hint": "",
            "image": "image.png",
            "grade": "grade2",
            "subject": "natural science",
            "split": "test",
        },
        "5": {
            "question": "What is shown?",
            "choices": ["a map", "a poem", "a cell"],
            "answer": 0,
            "hint": "Look at it.",
            "image": None,
            "grade": "grade8",
            "subject": "social science",
            "split": "test",
        },
        "6": {
            "question": "Not of this split",
            "choices": ["x", "y"],
            "answer": 0,
            "hint": "",
            "image": None,
            "grade": "grade8",
            "subject": "x",
            "split": "train",
        },
    }
    write(folder / "problems.json", {name: problem | common for name, problem in problems.items()})
    write(folder / "pid_splits.json", {"train": ["6"], "val": [], "test": ["4", "5"], "minival": [], "minitest": []})
    picture(folder / "images" / "test" / "4" / "image.png")


def encoded(colour):
    kept = BytesIO()
    Image.new("RGB", (24, 24), colour).save(kept, "JPEG")
    return base64.b64encode(kept.getvalue()).decode()


def mmbench(folder, has_rotations=True):
    """Two questions of three and two options; a rotation's image is the index of the row that holds it."""
    head = ["index", "question", "hint", "A", "B", "C", "D", "answer", "category", "image", "source"]
    head += ["l2-category", "comment", "split"]
    tail = ["x", "y", "", "dev"]
    rows = [
        [241, "What is it?", "", "cat", "dog", "bird", "", "B", "identity", encoded("red"), *tail],
        [252, "Where is it?", "It is day.", "left", "right", "", "", "A", "position", encoded("blue"), *tail],
    ]
    rotations = [
        [1000241, "What is it?", "", "dog", "bird", "cat", "", "A", "identity", "241", *tail],
        [2000241, "What is it?", "", "bird", "cat", "dog", "", "C", "identity", "241", *tail],
        [1000252, "Where is it?", "It is day.", "right", "left", "", "", "B", "position", "252", *tail],
    ]
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "mmbench_dev_20230712.tsv").open("w", newline="") as file:
        table = csv.writer(file, delimiter="\t")
        table.writerow(head)
        # The rotations first: their order in the file does not matter.
        table.writerows([*(rotations if has_rotations else []), *rows])


MAKERS = {"vqav2": vqav2, "gqa": gqa, "textvqa": textvqa, "pope": pope, "scienceqa": scienceqa, "mmbench": mmbench}


def make_suite(root, *names):
    for name in names or MAKERS:
        MAKERS[name](root / name)
    return root
