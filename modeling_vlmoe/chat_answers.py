"""Where `vlmoe chat` gets its answers: from a server with an OpenAI-compatible API, or from a model in this process.

Both take the same messages, in that API's form (images as `image_url` parts), and give the answer piece by piece.
"""

import json
from collections.abc import Callable, Iterator
from threading import Thread
from typing import Any

Messages = list[dict[str, Any]]
Answer = Callable[[Messages, dict[str, Any]], Iterator[str]]
SEED = "seed"  # a setting of the API; `generate` takes it from torch
# What the API calls by its own name; every other setting of `generate` goes to `transformers serve` as JSON.
REQUEST_NAMES = {"max_new_tokens": "max_tokens", "temperature": "temperature", "top_p": "top_p", SEED: SEED}


def request_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings of `generate` as fields of a request.

    A server that is not `transformers serve` may refuse the field `generation_config`, which is sent only where the
    API has no name of its own.
    """
    known = {REQUEST_NAMES[name]: value for name, value in settings.items() if name in REQUEST_NAMES}
    others = {name: value for name, value in settings.items() if name not in REQUEST_NAMES}
    if others.get("do_sample") is False:
        del others["do_sample"]
        known["temperature"] = 0.0
    if others:
        known["generation_config"] = json.dumps(settings)
    return known


def completions_url(base_url: str) -> str:
    """Where a server takes chats; its address may be given with or without `/v1`."""
    return f"{base_url.rstrip('/').removesuffix('/v1')}/v1/chat/completions"


def from_server(model: str, base_url: str) -> Answer:
    """Answers of a server.

    Args:
        model: what the server calls the model.
        base_url: its address, with or without `/v1`.
    """
    import httpx2  # not huggingface_hub's client, which HF_HUB_OFFLINE keeps from servers on this machine too

    def answer(messages: Messages, settings: dict[str, Any]) -> Iterator[str]:
        body = {"model": model, "messages": messages, "stream": True} | request_settings(settings)
        try:
            with httpx2.stream("POST", completions_url(base_url), json=body, timeout=None) as reply:
                if reply.is_error:
                    raise ValueError(
                        f"{base_url} refuses ({reply.status_code}): {reply.read().decode(errors='replace')} "
                        "Check the model's name, and what was sent."
                    )
                yield from map(read_piece, reply.iter_lines())
        except httpx2.ConnectError as error:
            raise ConnectionError(f"No server answers at {base_url}. Start one: vlmoe serve {model}") from error
        except httpx2.TransportError as error:
            raise ConnectionError(f"{base_url} broke off: {error}") from error

    return answer


def read_piece(line: str) -> str:
    """The piece of an answer in one line of a server's event stream; empty where it holds none.

    Raises:
        ValueError: where the server says that it failed.
    """
    data = line.removeprefix("data:").strip()
    if not line.startswith("data:") or data == "[DONE]":
        return ""
    event = json.loads(data)
    if "error" in event:
        raise ValueError(f"The server failed: {event['error']}. Try other settings or another message.")
    choices = event.get("choices") or [{}]
    return choices[0].get("delta", {}).get("content") or ""


def host_messages(messages: Messages) -> Messages:
    """The messages as processors of transformers read them: every content a list of parts, images by `url`."""
    found: Messages = []
    for message in messages:
        content = message["content"]
        parts: list[Any] = [{"type": "text", "text": content}] if isinstance(content, str) else content
        read = [
            {"type": "image", "url": part["image_url"]["url"]} if part["type"] == "image_url" else part
            for part in parts
        ]
        found.append({"role": message["role"], "content": read})
    return found


def check_takes_images(model_name_or_path: str) -> Any:
    """Refuses what is not there, and models of text alone.

    Returns:
        The model's configuration.

    Raises:
        ValueError: naming it.
    """
    from transformers import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, AutoConfig

    try:
        config = AutoConfig.from_pretrained(model_name_or_path)
    except OSError as error:
        raise ValueError(
            f"There is no model {model_name_or_path}, neither as a folder nor on a Hub that can be reached. Check the "
            f"name: {str(error).splitlines()[0]}"
        ) from error
    if type(config) not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        raise ValueError(
            f"{model_name_or_path} is a {config.model_type} model, which takes no images. Give a vision-language "
            "model; `transformers chat` is for others."
        )
    return config


def chat_processor(model_name_or_path: str, config: Any) -> Any:
    """The processor of a model that is loaded here.

    Raises:
        ValueError: if there is none that can be loaded, or it cannot lay out a conversation.
    """
    from transformers import AutoProcessor

    from modeling_vlmoe.conversion.host_processors import open_processor
    from modeling_vlmoe.conversion.parents import BROKEN

    from .modeling_in_place import is_in_place
    from .visible_marks import marked_for

    if is_in_place(config):
        processor = open_processor(model_name_or_path, config.body_model_type)
    else:
        try:
            processor = AutoProcessor.from_pretrained(model_name_or_path)
        except (*BROKEN, ImportError) as error:
            raise ValueError(
                f"{model_name_or_path} has no processor that can be loaded. Save the model's own beside it: {error}"
            ) from error
    if not getattr(processor, "chat_template", None):
        raise ValueError(
            f"The processor of {model_name_or_path} ({type(processor).__name__}) has no chat template, so that a chat "
            "cannot be laid out. Put the model's chat_template.jinja beside its weights."
        )
    return marked_for(config, processor)


def from_checkpoint(model_name_or_path: str) -> Answer:
    """Answers of a model loaded here, where accelerate places it.

    Args:
        model_name_or_path: a folder or a Hub id.
    """
    from transformers import AutoModelForImageTextToText, TextIteratorStreamer, set_seed

    from .chat_templates import TEMPLATE_ERRORS

    processor = chat_processor(model_name_or_path, check_takes_images(model_name_or_path))
    model = AutoModelForImageTextToText.from_pretrained(model_name_or_path, dtype="auto", device_map="auto").eval()

    def answer(messages: Messages, settings: dict[str, Any]) -> Iterator[str]:
        try:
            inputs = processor.apply_chat_template(
                host_messages(messages),
                add_generation_prompt=True,
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
            ).to(model.device)
        except TEMPLATE_ERRORS as error:
            raise ValueError(
                f"The processor ({type(processor).__name__}) cannot lay out this conversation: {error} Leave out what "
                "it does not take."
            ) from error
        streamer = TextIteratorStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
        if SEED in settings:
            set_seed(settings[SEED])
        settings = {name: value for name, value in settings.items() if name != SEED}
        failed: list[Exception] = []
        stopped: list[bool] = []

        def generate() -> None:
            try:
                model.generate(
                    **inputs, streamer=streamer, stopping_criteria=[lambda ids, *_: _all(ids, stopped)], **settings
                )
            except Exception as error:
                failed.append(error)
                streamer.end()

        worker = Thread(target=generate)
        worker.start()
        try:
            yield from streamer
        finally:  # also where nobody reads on
            stopped.append(True)
            worker.join()
        if failed:
            raise ValueError(f"The model cannot answer this: {failed[0]} Try other settings or another message.")

    return answer


def _all(ids: Any, stopped: list[bool]) -> Any:
    """For each row, whether generation is to stop."""
    return ids.new_full((len(ids),), bool(stopped), dtype=bool)
