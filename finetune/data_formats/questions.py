"""Rows of an image, a question and its answer, or the answers of several people.

{"image": "1.jpg", "question": "Which colour?", "answers": ["red", "red", "dark red"]}
"""

from collections import Counter
from collections.abc import Mapping
from typing import Any

from .chats import question_and_answer, shown
from .faults import FORM, NO_ANSWER, DataFault
from .given import ANSWERS, Given, Row, given_images, given_text

# One answer that the file has chosen, the second in VQAv2's annotations.
CHOSEN = ("answer", "multiple_choice_answer")


def answer_texts(answers: Any, where: str) -> list[str]:
    """All answers: texts or numbers, or mappings that hold one under `answer`, as VQA's annotations do.

    Raises:
        DataFault: naming the row.
    """
    given = [] if answers is None else answers if isinstance(answers, list) else [answers]
    texts: list[Any] = [one.get("answer") if isinstance(one, Mapping) else one for one in given]
    if all(isinstance(text, str | int | float) and not isinstance(text, bool) for text in texts):
        return [str(text) for text in texts]
    raise DataFault(
        f"{where}: its answers are {shown(answers)}; expected a text or a number, or a list of them. Write them so.",
        FORM,
    )


def majority(answers: list[str]) -> str:
    """The answer that most have given; of several the one that comes first."""
    return Counter(answers).most_common(1)[0][0]


def read_question(row: Row, where: str, question: str) -> Given:
    """A question; what is learnt is the answer that the file has chosen, else the one given most often.

    Raises:
        DataFault: naming the row.
    """
    images, asked = given_images(row, where), given_text(row, ("question",), where)
    chosen = [text for name in CHOSEN for text in answer_texts(row.get(name), where) if text.strip()]
    answers = answer_texts(row.get(ANSWERS), where)
    said = [text for text in answers if text.strip()]
    if not chosen and not said:
        raise DataFault(f"{where} has no answer; give one, or leave the row out.", NO_ANSWER)
    messages = question_and_answer(asked, chosen[0] if chosen else majority(said), len(images))
    return Given(messages, images, {ANSWERS: answers or chosen})
