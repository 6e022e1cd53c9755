"""The same conversations in every form of rows and every kind of file, as users write them."""

import io
import json
import tarfile
from pathlib import Path

from datasets import Dataset, Image, List
from PIL import Image as PILImage

COLOURS = {"red": (220, 20, 20), "green": (20, 200, 20), "blue": (20, 20, 220)}
# Images, and turns of question and answer; <image> is where one stands.
ONE = (["red.png"], [("<image>which colour?", "red")])
TWO = (["red.png", "blue.png"], [("<image><image>which colour?", "red and blue")])
TURNS = (
    ["red.png", "green.png"],
    [("<image>which colour?", "red"), ("and this: <image>?", "green"), ("sure?", "yes")],
)
TEXT = ([], [("two and two?", "four")])
# What a form without turns can say.
SINGLE = (ONE, TWO, TEXT)
TALKS = (*SINGLE, TURNS)
QUESTION = "which colour?"


def parts(text):
    first, *rest = text.split("<image>")
    found = [{"type": "text", "text": first}] if first else []
    for piece in rest:
        found += [{"type": "image"}, *([{"type": "text", "text": piece}] if piece else [])]
    return found


def as_messages(talk):
    images, turns = talk
    messages = []
    for question, answer in turns:
        messages += [{"role": "user", "content": parts(question)}, {"role": "assistant", "content": parts(answer)}]
    return {"messages": messages, "images": images}


def conversation(talk):
    """As LLaVA writes it: a line break behind a placeholder at the beginning."""
    turns = []
    for question, answer in talk[1]:
        text = question.replace("<image>which", "<image>\nwhich").replace("<image><image>", "<image>\n<image>")
        turns += [{"from": "human", "value": text}, {"from": "gpt", "value": answer}]
    return turns


def as_llava(talk):
    images = talk[0]
    row = {"id": talk[1][0][1], "conversations": conversation(talk)}
    return row | ({"image": images[0] if len(images) == 1 else images} if images else {})


def as_sharegpt(talk):
    turns = [turn | {"from": {"human": "user", "gpt": "assistant"}[turn["from"]]} for turn in conversation(talk)]
    return {"conversations": turns, "images": talk[0]}


def question_of(talk):
    return talk[1][0][0].replace("<image>", "")


def as_vqa(talk):
    answer = talk[1][0][1]
    row = {"question": question_of(talk), "answers": ["grey", answer, answer]}
    return row | ({"image": talk[0]} if talk[0] else {})


def as_caption(talk):
    row = {"caption": talk[1][0][1], "question": None if talk[0] else question_of(talk)}
    return row | ({"image": talk[0]} if talk[0] else {})


def as_label(talk):
    row = {"label": talk[1][0][1], "question": None if talk[0] else question_of(talk)}
    return row | ({"image": talk[0]} if talk[0] else {})


# What writes a row, and what such rows can say.
FORMS = {
    "messages": (as_messages, TALKS),
    "llava": (as_llava, TALKS),
    "sharegpt": (as_sharegpt, TALKS),
    "vqa": (as_vqa, SINGLE),
    "captions": (as_caption, SINGLE),
    "labels": (as_label, SINGLE),
}


def rows_of(form):
    write, talks = FORMS[form]
    return [write(talk) for talk in talks]


def draw(folder):
    """The pictures of the conversations."""
    for name, colour in COLOURS.items():
        PILImage.new("RGB", (24, 24), colour).save(folder / f"{name}.png")


def names_of(row):
    images = row.get("images", row.get("image")) or []
    return [images] if isinstance(images, str) else images


def write_jsonl(folder, rows):
    path = folder / "rows.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


def write_json(folder, rows):
    path = folder / "rows.json"
    path.write_text(json.dumps(rows, indent=1))
    return path


def write_tar(folder, rows, name="rows.tar", first=0):
    """Samples of a JSON object and the images that it names."""
    with tarfile.open(folder / name, "w:gz" if name.endswith("gz") else "w") as tar:
        for number, row in enumerate(rows, start=first):
            files = [(f"{number:04d}.json", json.dumps(row).encode())]
            renamed = {}
            for image in names_of(row):
                renamed[image] = f"{number:04d}.{image}"
                files.append((renamed[image], (folder / image).read_bytes()))
            for file, content in files:
                add(tar, file, content)
    return folder / name


def add(tar, name, content):
    info = tarfile.TarInfo(name)
    info.size = len(content)
    tar.addfile(info, io.BytesIO(content))


def write_parquet(folder, rows, name="rows.parquet"):
    """Images inside the file, as `datasets` writes them."""
    column = "images" if "images" in rows[0] else "image"
    stored = [
        row | {column: [{"bytes": (folder / image).read_bytes(), "path": None} for image in names_of(row)]}
        for row in rows
    ]
    Dataset.from_list(stored).cast_column(column, List(Image())).to_parquet(folder / name)
    return folder / name


FILES = {"jsonl": write_jsonl, "json": write_json, "tar": write_tar, "parquet": write_parquet}


def write(kind, folder, rows) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    draw(folder)
    return FILES[kind](folder, rows)
