"""Marks in token ids the text that images may see: everything but what the assistant says (see visible_text.py).

Where the assistant's turns are is read off token ids alone, so that it is known of text that is rendered already, with
the answers in it: a turn begins with the tokens of the header that the chat template writes before an answer, and ends
with the special token that closes it. Where a template closes answers by no such token, all that follows the first
header is the assistant's. Both are found by rendering probe conversations, and tried on others before they are used.

    >>> find_answer_tokens(processor)  # of ChatML
    AnswerTokens(header=(3, 270, 201), closer=4)
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

from .chat_templates import TEMPLATE_ERRORS
from .visible_text import VISIBLE_MARK, parts_reading_text

# Questions that end, and answers that begin and end, in what tokenizers may join to the text around it.
QUESTIONS = ("What is it?", "which colour", "Count to 3", "Say (yes)", "Name one:")
ANSWERS = (
    *("Red", "two words.", "7", "\n\nlines", "(a)", '"so"', "- item", "*x*", "#1", "/path", ": yes", "?!", "<tag>"),
    *("[0]", "{x}", "`c`", "ünï", "图", "_", "=", "...", "'s"),
)


@dataclass(frozen=True)
class AnswerTokens:
    """What an answer stands between.

    Attributes:
        header: the ids before it.
        closer: the id behind it; None where no special token closes it.
    """

    header: tuple[int, ...]
    closer: int | None


def _common_prefix(rows: Sequence[Sequence[int]]) -> list[int]:
    """What all rows begin with."""
    first = rows[0]
    end = next((i for i in range(len(first)) if any(row[i : i + 1] != first[i : i + 1] for row in rows)), len(first))
    return list(first[:end])


def _common_suffix(rows: Sequence[Sequence[int]]) -> list[int]:
    """What all rows end with."""
    return _common_prefix([row[::-1] for row in rows])[::-1]


class _Probe:
    """Renders and tokenises conversations as a processor does."""

    def __init__(self, processor: Any):
        self.processor, self.tokenizer = processor, processor.tokenizer
        self.never_split = {*self.tokenizer.all_special_ids, *self.tokenizer.added_tokens_decoder}

    def __call__(self, *turns: str, has_prompt: bool = False) -> list[int]:
        """The ids of a conversation in which user and assistant take turns."""
        roles = ("user", "assistant")
        messages = [
            {"role": roles[index % 2], "content": [{"type": "text", "text": turn}]} for index, turn in enumerate(turns)
        ]
        text = self.processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=has_prompt)
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def header(self) -> list[int]:
        """The ids before every answer: the prompt for one, as far as a finished turn repeats it, whatever it says."""
        answered, prompted, beyond = [], [], []
        for question in QUESTIONS:
            answered.append(_common_prefix([self(question, answer) for answer in ANSWERS]))
            prompted.append(_common_prefix([self(question, has_prompt=True), answered[-1]]))
            beyond.append(prompted[-1][len(_common_prefix([self(question), prompted[-1]])) :])
        # A template without a prompt has the end of the user turn before its answers (Llama 2), or a header that it
        # leaves to the model.
        ends = _common_suffix(prompted)
        says_something = self.tokenizer.decode(ends).strip()
        return _common_suffix(beyond) or (ends if says_something else _common_suffix(answered))

    def closer(self) -> int | None:
        """The first token behind an answer that is never split, where another turn follows."""
        behind = _common_suffix([self(QUESTIONS[0], answer, QUESTIONS[1]) for answer in ("Red", "two 7")])
        return next((token for token in behind if token in self.never_split), None)

    def is_right(self, found: AnswerTokens) -> bool:
        """Whether no token of an answer is visible, and those of questions are, as far as they have to be."""
        for answer in ANSWERS:
            first, last = QUESTIONS[0], QUESTIONS[1]
            pairs = [  # two conversations that differ in one turn, and whether that is to be seen
                ((first, answer, last, "No"), (first, "No", last, "No"), False),
                ((first, "No", last, answer), (first, "No", last, "No"), False),
                ((first, answer, last, "No"), ("vlmoe", answer, last, "No"), True),
                *(
                    [((first, answer, last, "No"), (first, answer, "vlmoe", "No"), True)]
                    if found.closer is not None
                    else []
                ),
            ]
            for one, other, is_seen in pairs:
                ids, others = self(*one), self(*other)
                start = len(_common_prefix([ids, others]))
                stop = len(ids) - len(_common_suffix([ids[start:], others[start:]]))
                marks = mark_visible(ids, found, None)[start:stop]
                if any((mark == VISIBLE_MARK) != is_seen for mark in marks):
                    return False
        return True


def mark_visible(ids: Sequence[int], answer: AnswerTokens, pad: int | None) -> list[int]:
    """The mark of each token: 3 where images may see it, 0 in the assistant's turns and in padding.

    Args:
        ids: of one sample, padded or not.
        answer: what answers stand between.
        pad: the padding's id; at both ends it is padding.
    """
    ids = list(ids)
    first, last = 0, len(ids)
    while first < last and ids[first] == pad:
        first += 1
    while last > first and ids[last - 1] == pad:
        last -= 1
    marks, header, place = [0] * len(ids), list(answer.header), first
    while place < last:
        if ids[place : place + len(header)] != header:
            marks[place] = VISIBLE_MARK
            place += 1
            continue
        place += len(header)
        while place < last and ids[place] != answer.closer:
            place += 1
        place += 1
    return marks


def search_answer_tokens(processor: Any) -> AnswerTokens:
    """What answers stand between, by a processor's chat template and tokenizer.

    Raises:
        ValueError: if there is no template, or it cannot be said.
    """
    name = type(processor).__name__
    if any(isinstance(one, int) for one in getattr(processor, "audio_token_ids", [])):
        raise ValueError(
            f"{name} has audio tokens, which are marked by {VISIBLE_MARK} as the text is that images may see. Choose "
            'another router_type than "attention" for this model.'
        )
    if not isinstance(getattr(processor, "chat_template", None), str):
        raise ValueError(
            f"{name} has no chat template, by which the assistant's turns are told from the text that images may see. "
            "Give it one (chat_template), and save it beside the weights."
        )
    probe = _Probe(processor)
    try:
        header, closer = tuple(probe.header()), probe.closer()
        candidates = [AnswerTokens(header, closer), AnswerTokens(header, None)] if header else []
        found = next((one for one in candidates if probe.is_right(one)), None)
    except TEMPLATE_ERRORS as error:
        raise ValueError(
            f"The chat template of {name} cannot render a user's and an assistant's turn: {error}. Give it one that "
            "does."
        ) from error
    if found is None:
        raise ValueError(
            f"The chat template of {name} writes no tokens before an answer by which it could be told from the text "
            "that images may see. Give it one that does: a header of the assistant's own, such as ChatML's."
        )
    return found


_FOUND: WeakKeyDictionary[Any, tuple[tuple[Any, ...], AnswerTokens]] = WeakKeyDictionary()


def find_answer_tokens(processor: Any) -> AnswerTokens:
    """As `search_answer_tokens`, once for each chat template and vocabulary of a processor."""
    key = (getattr(processor, "chat_template", None), id(processor.tokenizer), len(processor.tokenizer))
    if processor not in _FOUND or _FOUND[processor][0] != key:
        _FOUND[processor] = key, search_answer_tokens(processor)
    return _FOUND[processor][1]


def add_visible_marks(processor: Any, input_ids: Iterable[Any], types: list[list[int]]) -> list[list[int]]:
    """The types of tokens, with the text that images may see.

    Args:
        processor: whose they are.
        input_ids: of a batch.
        types: as the host gives them, 0 at all text.

    Raises:
        ValueError: as `search_answer_tokens`.
    """
    answer, pad = find_answer_tokens(processor), processor.tokenizer.pad_token_id
    marked = []
    for ids, row in zip(input_ids, types, strict=True):
        marks = mark_visible(ids if isinstance(ids, list) else ids.tolist(), answer, pad)
        marked.append([mark if type_ == 0 else type_ for mark, type_ in zip(marks, row, strict=True)])
    return marked


def mark_visible_text(processor: Any) -> Any:
    """Has a host's own processor mark the text that images may see, for a model of its class with a text gate.

    The processor is changed in place, and is saved as the host's: one that is loaded from a folder is to be given here
    again.

    Args:
        processor: with a chat template; our own has `marks_visible_text` for it.

    Returns:
        The processor.

    Raises:
        ValueError: as `search_answer_tokens`.

    >>> processor = mark_visible_text(AutoProcessor.from_pretrained("qwen2_5_vl-moe"))
    """
    if hasattr(processor, "marks_visible_text"):
        processor.marks_visible_text = True
        return processor
    find_answer_tokens(processor)
    host: Any = type(processor)

    def create_mm_token_type_ids(self, input_ids):
        return add_visible_marks(self, input_ids, host.create_mm_token_type_ids(self, input_ids))

    members = {
        "__module__": host.__module__,
        "return_mm_token_type_ids": True,
        "marks_visible_text": True,
        "create_mm_token_type_ids": create_mm_token_type_ids,
        "__reduce_ex__": lambda self, protocol: (_marked_again, (host, self.__dict__)),
    }
    processor.__class__ = type(host.__name__, (host,), members)
    return processor


def marked_for(config: Any, processor: Any) -> Any:
    """A processor as a model's configuration needs it: marking the text, where a router reads it.

    Raises:
        ValueError: as `search_answer_tokens`.
    """
    return mark_visible_text(processor) if parts_reading_text(config) else processor


def _marked_again(host: Any, state: dict[str, Any]) -> Any:
    processor = host.__new__(host)
    processor.__dict__.update(state)
    return mark_visible_text(processor)
