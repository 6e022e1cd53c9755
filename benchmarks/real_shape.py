"""A training step in the shapes of a 1.5 B LLM (Qwen2.5) and of SigLIP-so400m, and what `vlmoe plan` says of it.

Run: python -m benchmarks.real_shape

Random weights in bfloat16; generated pictures through the model's processor, the recipe `lora`'s collator and
transformers' Trainer. `dense` is LoRA on the dense vision-language model, `delta` the recipe on delta experts of rank
16 (LoRA on attention and on the dense layers' MLPs; the experts' pairs, routers and connector whole; the base frozen),
`full` LoRA on experts with weights of their own. 4 experts, top-2, on every second layer of the LLM.

Each way runs in a process of its own: steps of one batch, the first of which is not timed. Its peak is that of the
process' resident memory (VmHWM) above what it had after its imports; on a GPU that of torch's allocator, which is
held to 24 GB. Left to itself glibc keeps tensors of up to 32 MB in its heap, which gets gaps of gigabytes; the
processes are told to give each pages of its own (MALLOC_MMAP_THRESHOLD_), so that what is measured is what they take.

Goals: a step below 20 GB; `vlmoe plan` within 15 % of what is measured.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2Config,
    SiglipImageProcessorPil,
    SiglipVisionConfig,
    TrainerCallback,
)

from benchmarks.measuring import describe_machine
from modeling_vlmoe import VLMoEConfig, VLMoEProcessor
from modeling_vlmoe.conversion.meta_models import build_vlm, computed_buffers
from modeling_vlmoe.finetune.arguments import FinetuneArguments, parse_recipe
from modeling_vlmoe.finetune.gpus import CPU, GB, GPU
from modeling_vlmoe.finetune.memory_plan import estimate
from modeling_vlmoe.finetune.plan_batch import largest_batch
from modeling_vlmoe.finetune.train import build_trainer

WAYS = ("dense", "delta", "full")
NUM_LAYERS, VOCABULARY, IMAGE_SIZE, PATCH_SIZE = 28, 151936, 384, 14
NUM_IMAGE_TOKENS = (IMAGE_SIZE // PATCH_SIZE) ** 2
FRAME = 6  # tokens around question and answer
CAPACITY = 24e9
CHAT = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
WORDS = [f"word{index}" for index in range(1000)]


def make_config(way: str) -> VLMoEConfig:
    """The configuration of one way."""
    text = Qwen2Config(hidden_size=1536, intermediate_size=8960, num_hidden_layers=NUM_LAYERS, num_attention_heads=12,
                       num_key_value_heads=2, vocab_size=VOCABULARY, tie_word_embeddings=True)  # fmt: skip
    vision = SiglipVisionConfig(hidden_size=1152, intermediate_size=4304, num_hidden_layers=27, num_attention_heads=16,
                                image_size=IMAGE_SIZE, patch_size=PATCH_SIZE)  # fmt: skip
    moe: dict[str, Any] | None = None
    if way != "dense":
        delta = {"expert_type": "delta", "expert_rank": 16} if way == "delta" else {}
        moe = {"num_experts": 4, "num_experts_per_tok": 2, "layers": list(range(0, NUM_LAYERS, 2)), **delta}
    return VLMoEConfig(text_config=text, vision_config=vision, text_moe=moe, dtype="bfloat16")


def make_processor() -> VLMoEProcessor:
    """A processor of words, and of SigLIP's images."""
    special = ["<pad>", "<s>", "</s>", "<unk>", "<|im_start|>", "<|im_end|>"]
    names = [*special, "user", "assistant", "\n", *WORDS]
    tokenizer = Tokenizer(models.WordLevel({name: index for index, name in enumerate(names)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>",
                                   unk_token="<unk>", chat_template=CHAT,
                                   extra_special_tokens=["<|im_start|>", "<|im_end|>"])  # fmt: skip
    images = SiglipImageProcessorPil(size={"height": IMAGE_SIZE, "width": IMAGE_SIZE})
    return VLMoEProcessor.from_parents(images, fast, NUM_IMAGE_TOKENS)


def make_rows(folder: Path, num_rows: int, length: int) -> Any:
    """Questions on generated pictures, about `length` tokens each with the image's."""
    from modeling_vlmoe.finetune import load_chat_data

    generator = torch.Generator().manual_seed(0)
    lines = []
    for index in range(num_rows):
        pixels = torch.randint(256, (400, 500, 3), dtype=torch.uint8, generator=generator)
        Image.fromarray(pixels.numpy()).save(folder / f"{index}.png")
        chosen = torch.randint(len(WORDS), (max(length - NUM_IMAGE_TOKENS - FRAME, 2),), generator=generator).tolist()
        words = [WORDS[one] for one in chosen]
        question = [{"type": "image"}, {"type": "text", "text": " ".join(words[: len(words) // 2])}]
        answer = " ".join(words[len(words) // 2 :])
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        lines.append(json.dumps({"messages": messages, "images": [f"{index}.png"]}))
    (folder / "train.jsonl").write_text("\n".join(lines))
    return load_chat_data(folder / "train.jsonl")


@torch.no_grad()
def make_model(config: VLMoEConfig) -> Any:
    """A model of small random weights, in bfloat16, of which nothing is ever held twice."""
    model = build_vlm(config)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator(device).manual_seed(0)
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.is_meta:
                made = torch.empty(parameter.shape, dtype=torch.bfloat16, device=device)
                made.uniform_(-0.03, 0.03, generator=generator)
                module._parameters[name] = torch.nn.Parameter(made)
        for name, buffer in module._buffers.items():
            if buffer is not None and name not in module._non_persistent_buffers_set:
                module._buffers[name] = torch.zeros_like(buffer, device=device)
    model.tie_weights()
    computed_buffers(model)
    return model.to(device)


def resident(name: str = "VmRSS") -> int:
    """The process' resident memory, bytes: of now, or VmHWM, the most it ever had."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise ValueError(f"/proc/self/status has no {name}; measure on Linux.")


class StepTimes(TrainerCallback):
    """How long each step took, data loading included."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.start = time.perf_counter()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds.append(time.perf_counter() - self.start)
        self.start = time.perf_counter()


def make_arguments(folder: Path, args: argparse.Namespace) -> FinetuneArguments:
    """The recipe `lora`, for a few steps of one batch."""
    settings = ["model=random", "data=generated", f"output_dir={folder}", "report_to=none", "save_strategy=no",
                "disable_tqdm=true", "logging_steps=1", "gradient_accumulation_steps=1",
                f"max_steps={args.steps}", f"per_device_train_batch_size={args.batch}", *args.settings]  # fmt: skip
    return parse_recipe("lora", settings)


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """One way, in this process."""
    torch.set_num_threads(args.threads)
    is_gpu = torch.cuda.is_available()
    if is_gpu:
        torch.cuda.set_per_process_memory_fraction(
            min(1.0, CAPACITY / torch.cuda.get_device_properties(0).total_memory)
        )
    with tempfile.TemporaryDirectory() as name:
        folder, processor, config = Path(name), make_processor(), make_config(args.way)
        config.image_token_id = processor.image_token_id
        rows, recipe = make_rows(folder, args.batch * args.steps, args.length), make_arguments(folder / "out", args)
        batch = largest_batch(processor, rows, args.batch)
        if args.plan:
            plan = estimate(config, recipe, batch, GPU if is_gpu else CPU)
            return {"plan": plan.peak, "parts": plan.parts}
        before = resident()
        model = make_model(config)
        times = StepTimes()
        trainer = build_trainer(model, processor, rows, recipe)
        trainer.add_callback(times)
        trainer.train()
        peak = torch.cuda.max_memory_allocated() if is_gpu else resident("VmHWM") - before
    seconds = times.seconds[1:] or times.seconds
    return {"step": median(seconds), "peak": peak, "length": batch["input_ids"].shape[1]}


def in_own_process(way: str, plan: bool, words: list[str]) -> dict[str, Any]:
    """What a process of its own finds of one way."""
    given = [*words, "--way", way, *(["--plan"] if plan else [])]
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(2**20)}
    command = [sys.executable, "-m", __spec__.name, *given]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment)
    if done.returncode:
        raise RuntimeError(f"{way} ended with {done.returncode}; see above.")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=WAYS)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--length", type=int, default=1024, help="tokens of a row, the image's counted")
    parser.add_argument("--steps", type=int, default=3, help="the first is not timed")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--settings", nargs="*", default=[], metavar="KEY=VALUE", help="of the recipe")
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--plan", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.way:
        print(json.dumps(measure(args)))
        return
    print(f"{describe_machine()}; batch {args.batch} x {args.length} tokens, {args.settings or 'recipe lora'}\n")
    columns = ("way", "step, s", "of dense", "peak, GB", "of dense", "plan, GB", "of peak")
    print(f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|", flush=True)
    first: dict[str, Any] = {}
    for way in args.ways:
        planned, found = (in_own_process(way, plan, sys.argv[1:]) for plan in (True, False))
        first = first or found
        cells = [f"{found['step']:.1f}", f"{found['step'] / first['step']:.2f}", f"{found['peak'] / GB:.2f}"]
        cells += [f"{found['peak'] / first['peak']:.2f}", f"{planned['plan'] / GB:.2f}"]
        print(f"| {way} | {' | '.join(cells)} | {planned['plan'] / found['peak']:.2f} |", flush=True)


if __name__ == "__main__":
    main()
