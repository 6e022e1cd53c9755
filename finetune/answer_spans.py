"""Where the assistant's answers stand in a rendered conversation, whose template marks nothing.

An answer is what is rendered behind the prompt for it: a conversation up to there, rendered with its prompt, has to be
the beginning of the conversation with the answer, and that the beginning of the whole. A template that does otherwise
is refused. An answer ends with the token that closes its turn, where it has one: what follows is layout.

    >>> text = "<|im_start|>user\\nwhich colour?<|im_end|>\\n<|im_start|>assistant\\nred<|im_end|>\\n"
    >>> [text[first:last] for first, last in find_answers(render, messages, closers, where)]
    ['red<|im_end|>']
"""

from collections.abc import Callable, Sequence

from .rows import Conversation

Span = tuple[int, int]
# Renders a conversation, with the prompt for an answer where that is asked for.
Render = Callable[[Conversation, bool], str]


def closed_at(turn: str, closers: Sequence[str]) -> int:
    """Where a turn ends: behind the token that closes it, else with all that is rendered of it."""
    kept = turn.rstrip()
    return len(kept) if kept.endswith(tuple(closers)) else len(turn)


def find_answers(render: Render, messages: Conversation, closers: Sequence[str], where: str) -> list[Span]:
    """The characters of each answer in the rendered conversation, [first, behind the last).

    Args:
        render: the chat template.
        messages: the conversation.
        closers: the tokens that may close a turn.
        where: what messages call the conversation.

    Raises:
        ValueError: naming the conversation, where it cannot be said which characters are the answer's.
    """
    whole, spans = render(messages, False), []
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        if index == 0:
            raise ValueError(f"{where} begins with an answer, which has no prompt; put a message of the user first.")
        prompt = render(messages[:index], True)
        turn = render(messages[: index + 1], False) if index + 1 < len(messages) else whole
        if not turn.startswith(prompt):
            raise ValueError(
                f"{where}: the processor's chat template renders the prompt for message {index + 1}, an answer, "
                f"otherwise than the answered conversation ({_shown(prompt)} is not how it begins), so it is not "
                "known what the model is to say. Give the processor a chat template that does, and save it beside the "
                "weights."
            )
        if not whole.startswith(turn):
            raise ValueError(
                f"{where}: the processor's chat template renders message {index + 1}, an answer, otherwise once "
                "others follow, so it is not known what the model is to say. Make a row of each answer, with what "
                "stands before it."
            )
        spans.append((len(prompt), len(prompt) + closed_at(turn[len(prompt) :], closers)))
    return spans


def _shown(prompt: str) -> str:
    """The end of a prompt, where what differs mostly is."""
    return repr(prompt if len(prompt) <= 60 else f"...{prompt[-60:]}")
