"""A training step of a sparse LLM by what is trained: nothing, attention, experts by PEFT's path and by ours, all.

Run: python -m benchmarks.lora --experts 8 32 64

`frozen` takes the gradient of the embeddings and of nothing else: what any adapter's step costs at least. `peft` is
LoRA on experts as PEFT (0.21) runs it, `ours` the same adapter routed (see modeling_vlmoe/routed_lora.py). `copies` is
ours while the experts are still copies of one another, as upcycling leaves them, beside `dense`, the dense model with
LoRA on the same MLPs. Peaks are those of a step, above the model and its adapter; the gradients of what is trained are
counted apart, and left out of the ratio. Medians of runs in turn.

Goals: ours at most 1.35 times frozen, with at most 15 % more memory; copies at most 1.3 times dense.
"""

import argparse
from collections.abc import Callable
from typing import Any

import torch
from peft import get_peft_model
from transformers import LlamaConfig, SiglipVisionConfig

from benchmarks.measuring import describe_machine, in_turn, peak_bytes
from modeling_vlmoe import VLMoEConfig, VLMoEForConditionalGeneration
from modeling_vlmoe.finetune import lora_config
from modeling_vlmoe.routed_lora import routed_lora
from modeling_vlmoe.towers import sparse_blocks

SHAPES = {"small": (512, 1408), "1.5B": (1536, 8960)}  # widths of the model and its MLPs; the second are Qwen2.5's
LAYERS, VOCABULARY = 2, 1000
NUM_TOKENS, RANK, TOP_K = 512, 8, 2
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
WAYS = ("frozen", "attention", "peft", "ours", "full", "dense", "copies")
# Which parts get LoRA.
TARGETS = {
    "attention": ["attention"],
    "peft": ["experts"],
    "ours": ["experts"],
    "copies": ["experts"],
    "dense": ["mlp"],
}


def build(way: str, num_experts: int, dtype: torch.dtype, shape: str) -> Any:
    """The model of one way."""
    torch.manual_seed(0)
    width, middle = SHAPES[shape]
    text = LlamaConfig(hidden_size=width, intermediate_size=middle, num_hidden_layers=LAYERS, vocab_size=VOCABULARY,
                       num_attention_heads=8, num_key_value_heads=8)  # fmt: skip
    vision = SiglipVisionConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
                                image_size=16, patch_size=8)  # fmt: skip
    moe = None if way == "dense" else {"num_experts": num_experts, "num_experts_per_tok": TOP_K}
    config = VLMoEConfig(text_config=text, vision_config=vision, text_moe=moe)
    model: Any = VLMoEForConditionalGeneration(config)
    model = model.to(dtype)
    model.requires_grad_(way == "full")
    model.model.vision_tower.requires_grad_(False)
    if way == "copies":
        with torch.no_grad():
            for _, block in sparse_blocks(model):
                for value in block.experts.parameters():
                    value.copy_(value[:1].expand_as(value))
    if way in TARGETS:
        settings = {"lora_r": RANK, "lora_targets": TARGETS[way], "train_routers": False}
        model = get_peft_model(model, lora_config(model, **settings))
        with torch.no_grad():
            for name, value in model.named_parameters():
                if "lora_B" in name:
                    value.normal_(std=0.02)
    return model


def step(way: str, model: Any) -> Callable[[], None]:
    """One forward and backward on embeddings, as a function; the gradients are dropped."""
    generator = torch.Generator().manual_seed(0)
    dtype = next(model.parameters()).dtype
    width = model.config.text_config.hidden_size
    embeds = torch.randn(1, NUM_TOKENS, width, generator=generator).to(dtype).requires_grad_()
    labels = torch.randint(VOCABULARY, (1, NUM_TOKENS), generator=generator)
    model.eval()  # routers are frozen, and their losses left out

    def work() -> None:
        with routed_lora(way != "peft"):
            model(inputs_embeds=embeds, labels=labels).loss.backward()
        model.zero_grad(set_to_none=True)
        embeds.grad = None

    return work


def trained_bytes(model: Any) -> int:
    """The gradients of what is trained."""
    return sum(one.numel() * one.element_size() for one in model.parameters() if one.requires_grad)


def ratio(found: dict[str, float], way: str, other: str) -> str:
    return f"{found[way] / found[other]:.2f}" if other in found else "-"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experts", nargs="+", type=int, default=[8, 32, 64])
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"], choices=list(DTYPES))
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=WAYS)
    parser.add_argument("--shape", default="small", choices=list(SHAPES))
    parser.add_argument("--runs", type=int, default=15)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    width, middle = SHAPES[args.shape]
    print(f"{describe_machine()}; {LAYERS} layers, {width} wide, MLP {middle}, top-{TOP_K}, {NUM_TOKENS} tokens\n")
    columns = (
        "experts",
        "dtype",
        "way",
        "step, ms",
        "of frozen",
        "of dense",
        "gradients, MB",
        "peak, MB",
        "of frozen",
    )
    print(f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|", flush=True)
    for num_experts in args.experts:
        for dtype in args.dtypes:
            models = {way: build(way, num_experts, DTYPES[dtype], args.shape) for way in args.ways}
            steps: dict[str, Callable[[], object]] = {way: step(way, model) for way, model in models.items()}
            gradients = {way: trained_bytes(model) / 1e6 for way, model in models.items()}
            seconds = in_turn(steps, args.runs)
            peaks = {way: peak_bytes(work) / 1e6 - gradients[way] for way, work in steps.items()}
            for way in args.ways:
                times = [ratio(seconds, way, other) for other in ("frozen", "dense")]
                cells = [num_experts, dtype, way, f"{seconds[way] * 1e3:.1f}", *times]
                cells += [f"{gradients[way]:.1f}", f"{peaks[way]:.1f}", ratio(peaks, way, "frozen")]
                print(f"| {' | '.join(map(str, cells))} |", flush=True)


if __name__ == "__main__":
    main()
