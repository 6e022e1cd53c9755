"""Rows of chats with one, two and no images, in the forms that trainers read, as a user would write them."""

from datasets import Dataset
from PIL import Image

COLOURS = {"red": (220, 20, 20), "blue": (20, 20, 220), "green": (20, 200, 20)}
# The colours of each row's images and what is said of them; the second row is text only.
ROWS = [(["red"], "red"), ([], "nothing"), (["red", "blue"], "two"), (["green"], "green")]


def picture(colour: str) -> Image.Image:
    return Image.new("RGB", (24, 24), COLOURS[colour])


def user(num_images: int = 0, text: str = "which colour?") -> dict:
    return {"role": "user", "content": [{"type": "image"}] * num_images + [{"type": "text", "text": text}]}


def assistant(text: str) -> dict:
    return {"role": "assistant", "content": [{"type": "text", "text": text}]}


def chat_rows(rows=ROWS) -> list[dict]:
    """What our collator reads: `messages` and `images`."""
    return [
        {"messages": [user(len(colours)), assistant(said)], "images": [picture(colour) for colour in colours]}
        for colours, said in rows
    ]


def messages() -> Dataset:
    return Dataset.from_list(chat_rows())


def prompt_completion() -> Dataset:
    return Dataset.from_list(
        [
            {"prompt": [user(len(colours))], "completion": [assistant(said)], "images": list(map(picture, colours))}
            for colours, said in ROWS
        ]
    )


def single_image() -> Dataset:
    """One image per row, in the column `image`; the content is a plain string, and the trainer puts the image in."""
    chat = [{"role": "user", "content": "which colour?"}]
    return Dataset.from_list(
        [
            {"prompt": chat, "completion": [{"role": "assistant", "content": name}], "image": picture(name)}
            for name in COLOURS
        ]
    )


def preferences() -> Dataset:
    return Dataset.from_list(
        [
            {
                "prompt": [user(len(colours))],
                "chosen": [assistant(said)],
                "rejected": [assistant("no")],
                "images": list(map(picture, colours)),
            }
            for colours, said in ROWS
        ]
    )


def prompts() -> Dataset:
    return Dataset.from_list(
        [{"prompt": [user(len(colours))], "images": list(map(picture, colours))} for colours, _ in ROWS]
    )
