"""What kind of word each token of a text belongs to, by a rule that needs no model and no network.

| class | which tokens |
|---|---|
| `special` | special and added tokens of the tokenizer |
| `template` | what the chat template writes around the messages: roles, line ends, a system prompt of its own |
| `digits` | tokens whose word is a number |
| `punctuation` | tokens without letter or digit, white space too |
| `function` | tokens of an English function word (`FUNCTION_WORDS`) |
| `capitalised` | tokens of another word that begins with a capital |
| `other` | tokens of any other word |

A token that is a piece of a word has its word's class. The first class that fits holds.

>>> [token.kind for token in read_tokens(tokenizer, ids_of("What is 12?"), ["What is 12?"])]
['function', 'function', 'digits', 'punctuation']
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

CLASSES = ("special", "template", "digits", "punctuation", "function", "capitalised", "other")
_WORDS = """
a about above across after again against all along also although am an and any are around as at be because been
before behind being below beneath beside between beyond both but by can could did do does doing down during each
either every few for from had has have having he her here hers him his how i if in inside into is it its just may me
might more most much must my near neither no nor not of off on one only onto or other our ours out outside over own
per shall she should since so some such than that the their theirs them then there these they this those though
through to too toward towards under until up upon us very was we were what when where whether which while who whom
whose why will with within without would you your yours
"""
FUNCTION_WORDS = frozenset(_WORDS.split())
MOST_BYTES = 4  # of a character, and so of tokens that it may be spread over
WORD = re.compile(r"\w+(?:['’]\w+)*")
UNFINISHED = "\ufffd"  # what a tokenizer shows of a character of which it has seen the first bytes only


@dataclass(frozen=True)
class Token:
    """A token as it is shown.

    Attributes:
        text: its characters; of a character in several tokens, all with the last of them.
        kind: one of CLASSES.
    """

    text: str
    kind: str


def pieces(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """Each token's characters, so that together they are the decoded text."""
    found: list[str] = []
    first, said, unfinished = 0, "", 0
    for last in range(1, len(ids) + 1):
        text = tokenizer.decode(list(ids[first:last]), clean_up_tokenization_spaces=False)
        if text.endswith(UNFINISHED) and last < len(ids) and unfinished < MOST_BYTES:
            found.append("")
            unfinished += 1
            continue
        unfinished = 0
        found.append(text[len(said) :] if text.startswith(said) else tokenizer.decode([ids[last - 1]]))
        said = text
        if last - first >= 32:  # not from the beginning each time, which would take the square of the length
            first, said = last - 1, tokenizer.decode([ids[last - 1]], clean_up_tokenization_spaces=False)
    return found


def find_spans(text: str, contents: Sequence[str]) -> list[tuple[int, int]] | None:
    """Where the messages' texts stand in the rendered one, [first, behind the last), in order; None where one does
    not: then it is not known what is the template's.
    """
    found, place = [], 0
    for content in contents:
        wanted = content.strip()
        if (first := text.find(wanted, place)) < 0:
            return None
        place = first + len(wanted)
        found.append((first, place))
    return found


def word_kind(word: str) -> str:
    """The class of a whole word."""
    if any(letter.isdigit() for letter in word) and not any(letter.isalpha() for letter in word):
        return "digits"
    if word.lower().replace("’", "'").split("'")[0] in FUNCTION_WORDS:
        return "function"
    return "capitalised" if word[0].isupper() else "other"


def read_tokens(tokenizer: Any, ids: Sequence[int], contents: Sequence[str]) -> list[Token]:
    """The tokens of a row's text, without its images'.

    Args:
        tokenizer: the processor's.
        ids: the tokens.
        contents: the messages' texts, in order.
    """
    special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    shown = pieces(tokenizer, ids)
    text = "".join(shown)
    spans = find_spans(text, contents)
    words = [(found.start(), found.end(), word_kind(found.group())) for found in WORD.finditer(text)]
    tokens, place, index = [], 0, 0
    for token, piece in zip(ids, shown, strict=True):
        first, last = place + len(piece) - len(piece.lstrip()), place + len(piece)
        while index < len(words) and words[index][1] <= first:
            index += 1
        if token in special:
            kind = "special"
        elif spans is not None and not any(start < last and first < end for start, end in spans):
            kind = "template"
        elif first < last and index < len(words) and words[index][0] < last:
            kind = words[index][2]
        else:
            kind = "punctuation"
        tokens.append(Token(piece, kind))
        place = last
    for index in range(len(tokens) - 2, -1, -1):  # the first bytes of a character are of the class of its last
        if not tokens[index].text:
            tokens[index] = Token("", tokens[index + 1].kind)
    return tokens
