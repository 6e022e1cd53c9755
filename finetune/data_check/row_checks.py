"""Everything that may be wrong with one row, not only what comes first."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..data_formats.chats import check_answers_are_text, check_image_count
from ..data_formats.containers import RawRow
from ..data_formats.faults import MISMATCH, TOO_LONG, UNLEARNT, UNREADABLE, UNRENDERED, DataFault
from ..data_formats.reading import ROW, RowReader
from ..data_formats.table import BY_NAME
from ..image_files import open_image
from ..rows import check_text, conversation


@dataclass
class Checked:
    """A row that was looked at.

    Attributes:
        faults: all that is wrong with it.
        row: as the collator takes it; None where it could not be read.
        length: its tokens; None without a model, and where it has faults.
    """

    faults: list[DataFault]
    row: dict[str, Any] | None = None
    length: int | None = None


@dataclass
class RowCheck:
    """Looks at rows.

    Attributes:
        reader: makes chat rows of them.
        chats: lays them out for a model, as the collator does; None: there is no model.
        limit: the longest sample, in tokens.
        opened: of each image file that was looked at, why it cannot be opened.
    """

    reader: RowReader
    chats: Any = None
    limit: int | None = None
    opened: dict[str, str | None] = field(default_factory=dict)

    def __call__(self, raw: RawRow) -> Checked:
        """Looks at a row; its images are opened."""
        if raw.fault is not None:
            return Checked([raw.fault])
        try:
            given = BY_NAME[self.reader.form].read(raw.row, raw.where, self.reader.question)
        except DataFault as fault:
            return Checked([fault])
        images = [self.reader.places.stored(image) for image in given.images]
        row = {"messages": given.messages, "images": images, ROW: raw.number}
        faults = list(filter(None, (self._image_fault(image, raw.where) for image in images)))
        for check in (
            lambda: check_answers_are_text(given.messages, raw.where),
            lambda: check_image_count(given.messages, len(images), raw.where),
            lambda: check_text(row, self.chats.image_tokens if self.chats is not None else ()),
        ):
            try:
                check()
            except DataFault as fault:
                faults.append(DataFault(_renamed(str(fault), row, raw.where), fault.kind))
        if faults or self.chats is None:
            return Checked(faults, row)
        return self._by_model(row, raw.where)

    def _image_fault(self, stored: Mapping[str, Any], where: str) -> DataFault | None:
        """What is wrong with an image; one that many rows show is opened once."""
        if fault := self.reader.places.fault(stored, where):
            return fault
        path = None if stored.get("bytes") else stored["path"]
        if path is None or path not in self.opened:
            try:
                open_image(stored, "")
                said = None
            except ValueError as error:
                said = str(error)
            if path is None:
                return DataFault(f"{where}{said}", UNREADABLE) if said else None
            self.opened[path] = said
        return DataFault(f"{where}{self.opened[path]}", UNREADABLE) if self.opened[path] else None

    def _by_model(self, row: dict[str, Any], where: str) -> Checked:
        """What a model's processor makes of a row without faults."""
        try:
            self.chats.check(row)
            counted = self.chats.count_tokens(row)
            batch, said = self.chats.encode([conversation(row)], "right", [where])
        except ValueError as error:
            return Checked([DataFault(_renamed(str(error), row, where), UNRENDERED)], row)
        length, faults = int(batch["attention_mask"].sum()), []
        if length != counted:
            faults.append(
                DataFault(
                    f"{where}: it is {length} tokens long, but {counted} by the sizes of its images; mend the "
                    "processor's settings, or leave the row out.",
                    MISMATCH,
                )
            )
        if self.limit is not None and length > self.limit:
            faults.append(
                DataFault(
                    f"{where} is {length} tokens long ({len(row['images'])} images), beyond {self.limit}. Images are "
                    "never cut: shorten the text, leave the row out, or raise max_length.",
                    TOO_LONG,
                )
            )
        if not said.any():
            faults.append(
                DataFault(
                    f"{where} has no token of the assistant to learn: its answers hold reasoning alone, or the chat "
                    "template has no marks for them. Leave the row out, or build the processor by from_parents.",
                    UNLEARNT,
                )
            )
        return Checked(faults, row, length)


def _renamed(message: str, row: Mapping[str, Any], where: str) -> str:
    """A message about a row by the name that the report has for it."""
    return message.replace(f"Row {row[ROW]} of the data", where, 1)
