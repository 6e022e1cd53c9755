"""Rows of `messages` and `images`, the form of the chat templates.

{"messages": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Which colour?"}]},
              {"role": "assistant", "content": "red"}], "images": ["images/1.png"]}
"""

from .chats import read_messages
from .given import Given, Row, given_images


def read_chat(row: Row, where: str, question: str) -> Given:
    """A row of messages."""
    return Given(read_messages(row.get("messages"), where), given_images(row, where))
