"""Pictures and chats for tests of the processor."""

import numpy as np
from PIL import Image

from tests import tiny

NUM_IMAGE_TOKENS = tiny.NUM_PATCHES


def image(seed: int = 0, size: tuple[int, int] = (40, 30)) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def text_part(text):
    return {"type": "text", "text": text}


def chat(picture=None):
    """As Arrow hands it over: all parts with the same keys."""
    return [
        {
            "role": "user",
            "content": [
                {"type": "image", "image": picture or image(), "text": None, "url": None},
                {"type": "text", "image": None, "text": "what colour is the shape?", "url": None},
            ],
            "tool_calls": None,
        },
        {
            "role": "assistant",
            "content": [{"type": "text", "image": None, "text": "the red circle", "url": None}],
            "tool_calls": None,
        },
    ]
