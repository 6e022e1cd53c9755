"""Rows of an image and what it shows: a caption or several, or the label of its class.

{"image": "1.jpg", "caption": "A red circle."}
"""

from .chats import question_and_answer
from .faults import FORM, NO_ANSWER, DataFault
from .given import ANSWERS, Given, Row, given_images, given_text, prompt_of
from .questions import answer_texts

CAPTIONS = ("caption", "captions", "text")
LABEL = "label"


def read_caption(row: Row, where: str, question: str) -> Given:
    """A captioned image; of several captions the first is learnt, and all are kept.

    Raises:
        DataFault: naming the row.
    """
    images = given_images(row, where)
    given = next((row[name] for name in CAPTIONS if row.get(name) is not None), None)
    captions = [text for text in answer_texts(given, where) if text.strip()]
    if not captions:
        raise DataFault(f"{where} has no caption; give one, or leave the row out.", NO_ANSWER)
    prompt = prompt_of(row, len(images), question, "a caption", where)
    return Given(question_and_answer(prompt, captions[0], len(images)), images, {ANSWERS: captions})


def read_label(row: Row, where: str, question: str) -> Given:
    """An image and the name of its class.

    Raises:
        DataFault: naming the row.
    """
    images = given_images(row, where)
    if isinstance(row.get(LABEL), (int, float)):
        raise DataFault(f"{where}: its label is the number {row[LABEL]}; give the name of its class.", FORM)
    label = given_text(row, (LABEL,), where)
    prompt = prompt_of(row, len(images), question, "a label", where)
    return Given(question_and_answer(prompt, label, len(images)), images)
