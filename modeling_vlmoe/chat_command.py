"""`vlmoe chat`: what it shows and takes. Nothing heavy is imported before it runs."""

import sys
from contextlib import suppress
from typing import Annotated

import typer

DEFAULT_SETTINGS = {"max_new_tokens": 256}


def run_chat(
    model: Annotated[str, typer.Argument(help="A folder or a Hub id, or what the server calls the model.")],
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[URL] [KEY=VALUE]...",
            help="A server, http://localhost:8000/v1; not given: the model is loaded here. Then settings of "
            "`generate`: max_new_tokens=100 do_sample=false",
        ),
    ] = None,
    image: Annotated[list[str] | None, typer.Option(help="Image of the first message; may be repeated.")] = None,
    system_prompt: Annotated[str | None, typer.Option(help="What the conversation begins with.")] = None,
) -> None:
    """Chat with a model about images: one served at a URL, or a checkpoint loaded here.

    Attach a picture to a message by !image PATH; !help lists the other commands. Lines may be piped in: then nothing
    but the answers is printed, and a line that fails ends it.
    """
    from modeling_vlmoe import register

    from .chat import HELP, PROMPT, Chat, converse, read_settings
    from .chat_answers import from_checkpoint, from_server

    urls = [word for word in words or () if word.startswith(("http://", "https://"))]
    if len(urls) > 1:
        raise ValueError(f"Two servers are given, {' and '.join(urls)}. Give one.")
    settings = DEFAULT_SETTINGS | read_settings([word for word in words or () if word not in urls])
    register()
    answer = from_server(model, urls[0]) if urls else from_checkpoint(model)
    chat = Chat(answer, settings, system_prompt, say=lambda text: typer.echo(text, nl=False))
    chat.attach(image or ())

    def refuse(message: str) -> None:
        raise ValueError(message)

    is_terminal = sys.stdin.isatty()
    if is_terminal:
        with suppress(ImportError):  # Windows has no readline
            import readline  # noqa: F401 (line editing and history)
        typer.echo(HELP)
    converse(chat, lambda: input(PROMPT if is_terminal else ""), typer.echo if is_terminal else refuse)
