"""What 8 and 4 bits cost in accuracy, and what they save, on a checkpoint and questions about images.

Run, for example on what `vlmoe demo` leaves:

    python benchmarks/quantization.py demo-output/sparse/tuned/merged demo-output/data/test.jsonl

Each row is the same checkpoint, loaded anew: as it is; with its Linears quantized by transformers' own configuration,
which leaves experts as they are; with the LLM's experts alone; with Linears and experts, of the LLM and of every part.
`same` is the share of answers that the full model gives too; an interval is 95 % (Wilson). Bytes are those of
parameters and buffers.
"""

import argparse
import time
from collections.abc import Callable
from functools import partial
from typing import Any

from transformers import AutoModelForImageTextToText, AutoProcessor, BitsAndBytesConfig

import modeling_vlmoe
from modeling_vlmoe.finetune.data import load_chat_data
from modeling_vlmoe.finetune.evaluation import evaluate_vqa
from modeling_vlmoe.moe_config import PARTS
from modeling_vlmoe.quantization import (
    BITS,
    VLMoEQuantizationConfig,
    expert_bytes,
    quantize_experts,
    skipped_modules,
)

HEADER = "| weights | MB | experts, MB | accuracy | same | seconds |\n|---|---|---|---|---|---|"


def load(checkpoint: str, config: Any = None) -> Any:
    return AutoModelForImageTextToText.from_pretrained(
        checkpoint, quantization_config=config, device_map="auto"
    ).eval()


def load_and_pack(checkpoint: str, bits: int) -> Any:
    return quantize_experts(load(checkpoint), bits)


def ways(checkpoint: str) -> dict[str, Callable[[], Any]]:
    """How to load each row's model."""
    found: dict[str, Callable[[], Any]] = {"full": partial(load, checkpoint)}
    for bits in BITS:
        host = BitsAndBytesConfig(
            load_in_8bit=bits == 8, load_in_4bit=bits == 4, llm_int8_skip_modules=skipped_modules()
        )
        found |= {
            f"{bits} bits, Linears of the LLM": partial(load, checkpoint, host),
            f"{bits} bits, experts of the LLM": partial(load_and_pack, checkpoint, bits),
            f"{bits} bits, LLM": partial(load, checkpoint, VLMoEQuantizationConfig(bits)),
            f"{bits} bits, all parts": partial(load, checkpoint, VLMoEQuantizationConfig(bits, PARTS)),
        }
    return found


def megabytes(model: Any) -> float:
    tensors = [*model.parameters(), *model.buffers()]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors) / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="folder or Hub id of a vlmoe model")
    parser.add_argument("data", help="questions about images, as `vlmoe finetune` takes them")
    parser.add_argument("--limit", type=int, default=None, help="ask the first so many")
    args = parser.parse_args()
    modeling_vlmoe.register()
    processor = AutoProcessor.from_pretrained(args.checkpoint)
    rows = load_chat_data(args.data)
    rows = rows.select(range(min(len(rows), args.limit or len(rows))))
    print(f"{args.checkpoint}, {len(rows)} questions of {args.data}\n\n{HEADER}")
    answers: list[str] = []
    for name, make in ways(args.checkpoint).items():
        model = make()
        start = time.perf_counter()
        result = evaluate_vqa(model, processor, rows)
        seconds = time.perf_counter() - start
        answers = answers or result["predictions"]
        same = sum(map(str.__eq__, answers, result["predictions"])) / len(answers)
        accuracy = f"{result['accuracy']:.3f} [{result['low']:.3f} {result['high']:.3f}]"
        experts = sum(expert_bytes(model).values()) / 1e6
        print(
            f"| {name} | {megabytes(model):.2f} | {experts:.2f} | {accuracy} | {same:.3f} | {seconds:.0f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
