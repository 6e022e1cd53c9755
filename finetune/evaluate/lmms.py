"""lmms-eval's model `vlmoe`: `lmms_eval --model vlmoe --model_args pretrained=tuned/merged --tasks ...`.

It answers as `vlmoe evaluate` does: the processor's own chat template, batches padded on the left, images where the
task's messages have them. Imported by lmms-eval alone, so it may import lmms-eval.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from lmms_eval.api.model import lmms
from lmms_eval.protocol import ChatMessages
from tqdm import tqdm

from modeling_vlmoe import register

from ..collator import ChatCollator
from .loading import load_checkpoint

MAX_NEW_TOKENS = 128  # where a task does not say
SAMPLING = ("temperature", "top_p", "top_k")
PASSED = ("max_new_tokens", "num_beams", "repetition_penalty", "length_penalty", "min_new_tokens")
HANDLED = ("do_sample", "until", *SAMPLING, *PASSED)


def as_row(messages: Any, where: str) -> dict[str, Any]:
    """A task's messages as a row whose last message is left to the model.

    Raises:
        ValueError: if there is a video or a sound in them.
    """
    turns, images = [], []
    for message in ChatMessages(messages=messages).messages:
        parts = []
        for part in message.content:
            if part.type == "text":
                parts.append({"type": "text", "text": part.text})
            elif part.type == "image":
                parts.append({"type": "image", "text": None})
                images.append(part.url)
            else:
                raise ValueError(f"{where}: a message holds a {part.type}; choose a task of images and text.")
        turns.append({"role": message.role, "content": parts})
    answer = {"role": "assistant", "content": [{"type": "text", "text": ""}]}
    return {"messages": [*turns, answer], "images": images}


def generation_arguments(given: Mapping[str, Any]) -> dict[str, Any]:
    """What `generate` is called with for what a task asks for.

    Raises:
        ValueError: if it asks for something that is not handled.
    """
    if others := sorted(name for name in given if name not in HANDLED and given[name] is not None):
        raise ValueError(
            f"The task's generation_kwargs have {', '.join(others)}; expected some of {', '.join(HANDLED)}. "
            "Leave the others out."
        )
    samples = bool(given.get("do_sample")) and (given.get("temperature") or 1.0) > 0
    passed = {name: given[name] for name in PASSED if given.get(name) is not None}
    sampling = {name: given[name] for name in SAMPLING if samples and given.get(name) is not None}
    return {"max_new_tokens": MAX_NEW_TOKENS, "do_sample": samples} | passed | sampling


def cut(text: str, until: str | Sequence[str] | None) -> str:
    """A text up to the first of the words that end it."""
    for stop in [until] if isinstance(until, str) else until or []:
        text = text.split(stop)[0] if stop else text
    return text.strip()


class VLMoE(lmms):
    """A vlmoe model, an adapter, or a dense VLM of transformers, as lmms-eval runs one.

    Args:
        pretrained: a folder or a Hub id.
        batch_size: questions of a batch.
        device: where to; None: where torch has one.
        revision: of the model on the Hub.
        trust_remote_code: whether code that it carries may run.

    Raises:
        ValueError: if there is no such model, or an argument is not one of these.
    """

    is_simple = False

    def __init__(
        self,
        pretrained: str = "",
        batch_size: int | str = 1,
        device: str | None = None,
        revision: str | None = None,
        trust_remote_code: bool = False,
        **others: Any,
    ) -> None:
        super().__init__()
        if unknown := sorted(name for name, value in others.items() if value is not None and name != "max_batch_size"):
            raise ValueError(
                f"--model_args has {', '.join(unknown)}; expected pretrained, batch_size, device, revision, "
                "trust_remote_code. Leave the others out."
            )
        if not pretrained:
            raise ValueError("--model_args has no pretrained; give a vlmoe checkpoint: pretrained=tuned/merged.")
        register()
        self.model, self.processor = load_checkpoint(pretrained, revision, trust_remote_code)
        if device is not None:
            self.model = self.model.to(device)
        self.batch_size = int(batch_size)

    @torch.no_grad()
    def answer(self, rows: list[Mapping[str, Any]], given: Mapping[str, Any]) -> list[str]:
        """The answers to rows, up to the words that end them."""
        prompts = ChatCollator(self.processor, padding_side="left").prompts(rows)
        inputs = {name: value.to(self.model.device) for name, value in prompts.items()}
        pad = self.processor.tokenizer.pad_token_id
        output = self.model.generate(**inputs, **generation_arguments(given), pad_token_id=pad)
        new = output[:, inputs["input_ids"].shape[1] :]
        return [cut(text, given.get("until")) for text in self.processor.batch_decode(new, skip_special_tokens=True)]

    def generate_until(self, requests: list[Any]) -> list[str]:
        """Answers to lmms-eval's requests, in their order; those that are to be generated alike share batches."""
        alike: dict[str, list[int]] = {}
        for index, request in enumerate(requests):
            alike.setdefault(repr(request.args[2]), []).append(index)
        answers = [""] * len(requests)
        bar = tqdm(total=len(requests), desc="Answering", disable=None)
        for indices in alike.values():
            for start in range(0, len(indices), self.batch_size):
                batch = indices[start : start + self.batch_size]
                found = self.answer([self.row_of(requests[index]) for index in batch], requests[batch[0]].args[2])
                for index, text in zip(batch, found, strict=True):
                    answers[index] = text
                    self.cache_hook.add_partial("generate_until", requests[index].args, text)
                bar.update(len(batch))
        bar.close()
        return answers

    def row_of(self, request: Any) -> dict[str, Any]:
        """A request's question."""
        _, doc_to_messages, _, number, task, split = request.args
        return as_row(doc_to_messages(self.task_dict[task][split][number]), f"{task}, row {number}")

    def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
        """Refused: answers are generated."""
        raise ValueError("The model vlmoe generates answers; choose a task of output_type generate_until.")

    def generate_until_multi_round(self, requests: list[Any]) -> list[str]:
        """Refused: a question is answered once."""
        raise ValueError("The model vlmoe answers in one round; choose a task of output_type generate_until.")
