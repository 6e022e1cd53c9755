"""`vlmoe chat` in the terminal: what is typed, what it does, what is said back.

The commands are those of `transformers chat` (`!help`, `!clear`, `!set`, `!status`, `!save`, `!exit`), and `!image`,
which attaches pictures to the next message.
"""

import base64
import json
import mimetypes
import shlex
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from .chat_answers import SEED, Answer, Messages

HELP = """\
!image PATH ...     attach images (paths or URLs) to the next message
!set KEY=VALUE ...  settings of `generate`: max_new_tokens=100 do_sample=false
!clear              begin a new conversation
!status             the settings, and the images attached
!save FILE          write the conversation as JSON
!help               this
!exit               end; Ctrl-C stops an answer"""
PROMPT = "> "


def image_url(source: str) -> str:
    """An address that a server can read: a URL as it is, a file as a data URL.

    Raises:
        ValueError: for a file that is not there, or is no image.
    """
    from PIL import Image, UnidentifiedImageError

    if source.startswith(("http://", "https://", "data:")):
        return source
    path = Path(source).expanduser()
    kind = mimetypes.guess_type(path.name)[0] or ""
    if not path.is_file() or not kind.startswith("image/"):
        reason = "it is no image by its name" if path.is_file() else "there is no such file"
        raise ValueError(f"Cannot attach {source}: {reason}. Give the path or the URL of an image.")
    try:
        Image.open(path).verify()
    except (UnidentifiedImageError, OSError, SyntaxError) as error:
        raise ValueError(f"Cannot attach {source}: nothing can read it as an image. Give another.") from error
    return f"data:{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"


def read_settings(words: list[str]) -> dict[str, Any]:
    """Settings of `generate` from `KEY=VALUE` words, read as `transformers chat` reads them.

    Raises:
        ValueError: for a word without `=`, a value that it cannot read or `generate` cannot use, or a setting that
            it does not know.
    """
    import typer
    from transformers import GenerationConfig
    from transformers.cli.chat import parse_generate_flags

    try:
        settings = parse_generate_flags(words)
    except typer.BadParameter as error:
        raise ValueError(f"{error.message} Write them as max_new_tokens=100.") from error
    try:
        GenerationConfig(**{name: value for name, value in settings.items() if name != SEED}).validate()
    except (TypeError, ValueError) as error:
        given = ", ".join(f"{name}={value}" for name, value in settings.items())
        raise ValueError(f"`generate` cannot use {given}: {error} Give another value.") from error
    known = GenerationConfig()
    if unknown := [name for name in settings if not (hasattr(known, name) or name == SEED)]:
        raise ValueError(f"`generate` has no settings {', '.join(unknown)}. Leave them out, or correct their names.")
    return settings


class Chat:
    """A conversation.

    Args:
        answer: gives the answer to the messages so far, in pieces.
        settings: of `generate`.
        system_prompt: what it begins with.
        say: prints a piece of text, without a line break.
    """

    def __init__(
        self,
        answer: Answer,
        settings: dict[str, Any] | None = None,
        system_prompt: str | None = None,
        say: Callable[[str], None] = print,
    ):
        self.answer, self.settings, self.say = answer, dict(settings or {}), say
        self.opening: Messages = [{"role": "system", "content": system_prompt}] if system_prompt else []
        self.commands: dict[str, Callable[[list[str]], None]] = {
            "!image": self.attach,
            "!set": self.set,
            "!clear": self.clear,
            "!status": self.status,
            "!save": self.save,
            "!help": lambda words: self.say(f"{HELP}\n"),
        }
        self.clear([])

    def clear(self, words: list[str]) -> None:
        """Begins anew."""
        self.messages: Messages = list(self.opening)
        self.images: list[str] = []

    def attach(self, words: Iterable[str]) -> None:
        """Attaches images to the next message."""
        self.images += [image_url(word) for word in words]

    def set(self, words: list[str]) -> None:
        """Changes settings."""
        self.settings |= read_settings(words)

    def status(self, words: list[str]) -> None:
        """Shows settings and what is attached."""
        self.say(f"settings: {json.dumps(self.settings)}\nimages attached: {len(self.images)}\n")

    def save(self, words: list[str]) -> None:
        """Writes the conversation."""
        if len(words) != 1:
            raise ValueError("!save takes one file name. Give it.")
        Path(words[0]).write_text(json.dumps(self.messages, indent=2, ensure_ascii=False), encoding="utf-8")

    def ask(self, text: str) -> None:
        """Sends a message with the attached images and says the answer; what fails or is stopped is forgotten."""
        parts = [{"type": "image_url", "image_url": {"url": url}} for url in self.images]
        asked = {"role": "user", "content": [*parts, {"type": "text", "text": text}]}
        said = ""
        pieces = self.answer([*self.messages, asked], self.settings)
        try:
            for piece in pieces:
                said += piece
                self.say(piece)
        except KeyboardInterrupt:
            pieces.close()  # type: ignore[attr-defined]
        self.say("\n")
        self.messages += [asked, {"role": "assistant", "content": said}]
        self.images = []

    def handle(self, line: str) -> None:
        """One line of the user's.

        Raises:
            ValueError: for a command that is unknown or cannot be done, and for what the model or the server refuses.
        """
        if not line.startswith("!"):
            self.ask(line)
            return
        try:
            name, *words = shlex.split(line)
        except ValueError as error:
            raise ValueError(f"Cannot read {line!r}: {error}. Set quotes in pairs.") from error
        if name not in self.commands:
            raise ValueError(f"{name} is unknown. Known: {', '.join(self.commands)}, !exit.")
        self.commands[name](words)


def converse(chat: Chat, read: Callable[[], str], complain: Callable[[str], None]) -> None:
    """Handles lines until `!exit`, the end of the input, or Ctrl-C at the prompt."""
    while True:
        try:
            line = read().strip()
        except (EOFError, KeyboardInterrupt):
            return
        if line == "!exit":
            return
        if not line:
            continue
        try:
            chat.handle(line)
        except (ValueError, OSError) as error:
            complain(str(error))
