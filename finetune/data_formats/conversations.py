"""Rows of `conversations` in turns of `from` and `value`: LLaVA's JSON with one `image`, ShareGPT with `images`.

{"id": "1", "image": "coco/1.jpg", "conversations": [{"from": "human", "value": "<image>\\nWhich colour?"},
                                                     {"from": "gpt", "value": "red"}]}
"""

from collections.abc import Mapping
from typing import Any

from .chats import check_answered, placed_parts, shown
from .faults import EMPTY, FORM, MESSAGES, ROLE, DataFault
from .given import Given, Row, given_images

TURNS = "conversations"
# Who speaks, as the files of others call them.
SPEAKERS: Mapping[str, str] = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "chatgpt": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
}


def _turn(turn: Any, where: str) -> dict[str, Any]:
    """A turn as a message.

    Raises:
        DataFault: naming the row.
    """
    turn = {key: value for key, value in turn.items() if value is not None} if isinstance(turn, Mapping) else {}
    who, what = ("from" if "from" in turn else "role"), ("value" if "value" in turn else "content")
    if others := sorted(set(turn) - {who, what}):
        raise DataFault(
            f"{where}: a turn has {', '.join(map(str, others))}, of which nothing would be learnt; expected from and "
            "value. Write into the value what the model is to read or say, and leave the others out.",
            MESSAGES,
        )
    speaker, text = turn.get(who), turn.get(what)
    if not isinstance(speaker, str) or not isinstance(text, str):
        raise DataFault(f'{where}: a turn is {shown(turn)}; expected {{"from": ..., "value": "..."}}.', MESSAGES)
    if speaker not in SPEAKERS:
        raise DataFault(
            f"{where}: a turn is from {speaker!r}; expected one of {', '.join(SPEAKERS)}. Calls of functions are "
            "written by each chat template in its own way: give them as text of the assistant.",
            ROLE,
        )
    return {"role": SPEAKERS[speaker], "content": placed_parts(text)}


def read_conversation(row: Row, where: str, question: str) -> Given:
    """A row of turns, with a `system` text in front where it has one.

    Raises:
        DataFault: naming the row.
    """
    turns = row.get(TURNS)
    if not isinstance(turns, list) or not turns:
        raise DataFault(f'{where} has no "{TURNS}"; expected a list of {{"from": ..., "value": ...}}.', EMPTY)
    if row.get("tools"):
        raise DataFault(
            f"{where} has tools, which would not be learnt; write them into the system's text, and leave tools out.",
            FORM,
        )
    messages = [_turn(turn, where) for turn in turns]
    if (system := row.get("system")) is not None and not isinstance(system, str):
        raise DataFault(f'{where}: its "system" is {shown(system)}; expected a text. Write one.', FORM)
    if system:
        messages.insert(0, {"role": "system", "content": placed_parts(system)})
    check_answered(messages, where)
    return Given(messages, given_images(row, where))
