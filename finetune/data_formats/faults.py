"""What may be wrong with a row, in kinds that can be counted."""

from collections.abc import Mapping

# The kinds, in the order in which they are told, each in the words of a report.
BROKEN, FORM, MESSAGES, ROLE = "broken_rows", "other_form", "broken_messages", "unknown_role"
EMPTY, NO_ANSWER = "no_messages", "no_answer"
UNPLACED, UNFILLED = "images_without_placeholder", "placeholders_without_image"
ANSWERED = "images_in_answers"
OUTSIDE, MISSING, UNREADABLE = "images_outside_the_folder", "missing_images", "unreadable_images"
IN_TEXT, MISMATCH, TOO_LONG, UNLEARNT = "image_token_in_text", "token_mismatch", "too_long", "nothing_to_learn"
UNRENDERED = "not_rendered"
KINDS: Mapping[str, str] = {
    BROKEN: "rows that cannot be read",
    FORM: "rows of another form",
    EMPTY: "rows without messages",
    MESSAGES: "rows with a message that is none",
    ROLE: "rows with an unknown role",
    NO_ANSWER: "rows without an answer",
    UNPLACED: "rows with an image that has no placeholder",
    UNFILLED: "rows with a placeholder that has no image",
    ANSWERED: "rows with an image in an answer",
    OUTSIDE: "images that leave the data's folder",
    MISSING: "images that are not there",
    UNREADABLE: "images that cannot be opened",
    IN_TEXT: "rows whose text holds the token of an image",
    UNRENDERED: "rows that the chat template does not take",
    MISMATCH: "rows whose images have another number of tokens than counted",
    TOO_LONG: "rows that are too long",
    UNLEARNT: "rows with no token to learn",
}


class DataFault(ValueError):
    """A row that is wrong.

    Args:
        message: names the row, and says what to do.
        kind: one of `KINDS`.
    """

    # The message alone has to do: a worker's error is built again from it.
    def __init__(self, message: str, kind: str = FORM):
        super().__init__(message)
        self.kind = kind
