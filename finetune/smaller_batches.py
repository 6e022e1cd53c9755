"""Batches that a plan is made with, and how they could be smaller: shorter rows, smaller or fewer images.

Two makers, of an example's batches and of some data's, which say in their own words what is to be given or done.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol

from .collator import ChatCollator
from .image_files import open_image
from .plan_batch import Batch, Row, example_batch, example_row, largest_rows, num_pixels, repeated, slim
from .rows import where_is

SHARES = (0.5, 0.75, 0.875)  # of a row's length
SHORTER, SMALLER, FEWER = "less text is learnt from", "less is seen", "fewer images are seen"


class Cut(NamedTuple):
    """Smaller batches: what to give or do for them, what that costs, and the batches that may be the largest then."""

    how: str
    price: str
    batches: list[Batch]


class MakeBatches(Protocol):
    """Makes batches of so many rows, all that may be the largest; and smaller ones."""

    def __call__(self, num_rows: int) -> list[Batch]: ...

    def cuts(self, num_rows: int) -> Iterator[Cut]:
        """Ways to make them smaller."""
        ...


class ExampleBatches:
    """Of a text and pictures of sizes that are asked for; arguments as of `example_batch`."""

    def __init__(self, processor: Any, length: int, num_images: int, size: tuple[int, int]):
        self.processor, self.length, self.num_images, self.size = processor, length, num_images, size

    def __call__(self, num_rows: int) -> list[Batch]:
        return [example_batch(self.processor, num_rows, self.length, self.num_images, self.size)]

    def _of(self, num_rows: int, length: int, num_images: int, size: tuple[int, int]) -> list[Batch]:
        """A batch of other sizes; none where the images do not fit into the length."""
        try:
            return [example_batch(self.processor, num_rows, length, num_images, size)]
        except ValueError:
            return []

    def cuts(self, num_rows: int) -> Iterator[Cut]:
        """See `MakeBatches`. With smaller or fewer images rows keep their text."""
        for share in SHARES:
            length = int(share * self.length)
            if batches := self._of(num_rows, length, self.num_images, self.size):
                yield Cut(f"--length {length}", SHORTER, batches)
                break  # the shortest that holds the images
        half = max(self.size[0] // 2, 1), max(self.size[1] // 2, 1)
        others = [(f"--image-size {half[0]}x{half[1]}", SMALLER, self.num_images, half)] if self.num_images else []
        if self.num_images > 1:
            others.append((f"--images {self.num_images // 2}", FEWER, self.num_images // 2, self.size))
        for how, price, num_images, size in others:
            length = self.length - self._num_tokens(self.num_images, self.size) + self._num_tokens(num_images, size)
            batches = self._of(num_rows, length, num_images, size)
            if any(is_smaller(batch, self(num_rows)[0]) for batch in batches):
                yield Cut(how, price, batches)

    def _num_tokens(self, num_images: int, size: tuple[int, int]) -> int:
        return ChatCollator(self.processor)([example_row(num_images, size)])["input_ids"].shape[1]


class DataBatches:
    """Of some data: of the row with the most tokens, and of that with the most pixels.

    Args:
        processor: the model's.
        rows: as `load_chat_data` gives them, or a list of them.
    """

    def __init__(self, processor: Any, rows: Any):
        self.collate, self.num_rows = ChatCollator(processor), len(rows)
        self.rows: tuple[Row, ...] = tuple(rows[index] for index in dict.fromkeys(largest_rows(processor, slim(rows))))
        self.made: dict[int, list[Batch]] = {}

    def __call__(self, num_rows: int) -> list[Batch]:
        if num_rows not in self.made:
            self.made[num_rows] = self._of(min(num_rows, self.num_rows), self.rows)
        return self.made[num_rows]

    def _of(self, num_rows: int, rows: tuple[Row, ...]) -> list[Batch]:
        """The longest row with as many of the others as there is room for; where there is none, each by itself."""
        if num_rows == 1 or len(rows) == 1:
            return [repeated(self.collate([row]), num_rows) for row in rows]
        return [self.collate([rows[0], *[rows[-1]] * (num_rows - 1)])]

    def cuts(self, num_rows: int) -> Iterator[Cut]:
        """See `MakeBatches`."""
        before = self(num_rows)
        for change, price in ((half_of_text, SHORTER), (half_as_large, SMALLER), (half_of_images, FEWER)):
            try:
                rows = tuple(change(row) for row in self.rows)
                batches = self._of(min(num_rows, self.num_rows), rows)
            except ValueError:  # nothing would be left to learn
                continue
            if all(is_smaller(*pair) for pair in zip(batches, before, strict=True)):
                longest = max(batch["input_ids"].shape[1] for batch in batches)
                hows = {
                    SHORTER: f"data with rows of at most {longest} tokens",
                    SMALLER: "data with images of half the width and height",
                    FEWER: f"data with at most {max(len(row['images'] or []) for row in rows)} images a row",
                }
                yield Cut(hows[price], price, batches)


def is_smaller(batch: Batch, other: Batch) -> bool:
    """Whether a batch has fewer tokens or pixels than another."""
    sizes = [(one["input_ids"].numel(), num_pixels(one)) for one in (batch, other)]
    return sizes[0] != sizes[1] and all(less <= more for less, more in zip(*sizes, strict=True))


def _with_parts(row: Row, change: Any) -> dict[str, Any]:
    """A row whose messages' parts are changed; parts that become None are left out."""
    messages = []
    for message in row["messages"]:
        content = message["content"]
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        changed = [new for part in parts if (new := change(part)) is not None]
        messages.append({**message, "content": changed})
    return {**row, "messages": messages}


def half_of_text(row: Row) -> dict[str, Any]:
    """A row with the first half of each text."""

    def change(part: dict[str, Any]) -> dict[str, Any]:
        return {**part, "text": part["text"][: -(-len(part["text"]) // 2)]} if part["type"] == "text" else part

    return _with_parts(row, change)


def half_as_large(row: Row) -> dict[str, Any]:
    """A row with images of half the width and height."""
    images = [open_image(image, where_is(row)) for image in row["images"] or []]
    return {**row, "images": [image.resize([max(side // 2, 1) for side in image.size]) for image in images]}


def half_of_images(row: Row) -> dict[str, Any]:
    """A row with the first half of its images, where it has several."""
    images = list(row["images"] or [])
    num_kept = max(len(images) // 2, min(len(images), 1))
    left = iter([True] * num_kept + [False] * (len(images) - num_kept))
    kept = _with_parts(row, lambda part: part if part["type"] != "image" or next(left) else None)
    return {**kept, "images": images[:num_kept]}
