"""Upcycling a 1.3 GB bf16 LLM to 8 experts (7.2 GB), next to what bounds it and to what everybody would write first.

Routes, each in a process of its own, one after the other in every round:

    plain      the bytes of the output written from the mapped source, nothing else: the limit
    upcycle    `vlmoe upcycle`, with the proof
    unproved   the same without the proof (for orientation)
    memory     `from_vision_text_pretrained` and `save_pretrained`
    naive      load the dense models, build the sparse one, copy, `save_pretrained`

Run: python benchmarks/conversion.py --folder /tmp/conversion-benchmark --runs 3

`wall` and `CPU` are without Python's start and imports; `RssAnon` is the peak of private memory above what the process
held after its imports. Page cache is left as it is. Medians over the runs.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from statistics import median

ROUTES = ("plain", "upcycle", "unproved", "memory", "naive")
TEXT = {
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 12,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "vocab_size": 32000,
    "tie_word_embeddings": False,
}
VISION = {
    "hidden_size": 192,
    "intermediate_size": 768,
    "num_hidden_layers": 6,
    "num_attention_heads": 3,
    "image_size": 96,
    "patch_size": 16,
}
NUM_EXPERTS, SAMPLE_SECONDS = 8, 0.01


def save_parents(folder: Path) -> None:
    """Writes the seeded parents, tensor by tensor."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import (
        AutoConfig,
        AutoModel,
        AutoModelForCausalLM,
        PreTrainedTokenizerFast,
        SiglipImageProcessorPil,
    )

    from modeling_vlmoe.conversion.meta_models import build_on_meta, target_shapes
    from modeling_vlmoe.conversion.seeding import tensor_generator
    from modeling_vlmoe.conversion.streaming import TensorSpec, write_checkpoint

    text, vision = folder / "text", folder / "vision"
    if (vision / "preprocessor_config.json").is_file():
        return
    shutil.rmtree(text, ignore_errors=True)
    text.mkdir(parents=True)
    config = AutoConfig.for_model("llama", **TEXT, dtype="bfloat16", architectures=["LlamaForCausalLM"])
    shapes = target_shapes(build_on_meta(lambda: AutoModelForCausalLM.from_config(config)))

    def blocks(name: str):
        is_norm = len(shapes[name]) == 1
        noise = torch.empty(shapes[name]).normal_(std=0.02, generator=tensor_generator(0, name))
        yield (noise + is_norm).to(torch.bfloat16)

    write_checkpoint(text, [TensorSpec(name, torch.bfloat16, shape) for name, shape in shapes.items()], blocks)
    config.save_pretrained(text)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(["<s>", "</s>", *alphabet])}, merges=[]))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>", pad_token="</s>").save_pretrained(
        text
    )
    torch.manual_seed(0)
    AutoModel.from_config(AutoConfig.for_model("siglip_vision_model", **VISION)).to(torch.bfloat16).save_pretrained(
        vision
    )
    SiglipImageProcessorPil(size={"height": 96, "width": 96}).save_pretrained(vision)


def prepare_upcycle(folder: Path, output: Path, is_proved: bool = True):
    from modeling_vlmoe.conversion import UpcycleArguments
    from modeling_vlmoe.conversion import upcycle as run

    if not is_proved:
        from modeling_vlmoe.conversion import proved_writing
        from modeling_vlmoe.conversion.gaps import Findings, Gap

        proved_writing.prove = lambda *args, **kwargs: Findings({"none": Gap(0.0)})
    return lambda: run(
        UpcycleArguments(
            text_model=str(folder / "text"),
            vision_model=str(folder / "vision"),
            output_dir=str(output),
            text_experts=NUM_EXPERTS,
        )
    )


def prepare_plain(folder: Path, output: Path):
    import mmap

    def run() -> None:
        output.mkdir()
        views = []
        for name in ("vision", "text"):
            with (folder / name / "model.safetensors").open("rb") as source:
                views.append(memoryview(mmap.mmap(source.fileno(), 0, access=mmap.ACCESS_READ)))
        num_bytes = json.loads((folder / "size.json").read_text())
        with open(output / "bytes", "wb", buffering=0) as file:
            while num_bytes > 0:
                for view in views:
                    for start in range(0, len(view), 2**26):
                        num_bytes -= file.write(view[start : start + min(2**26, max(num_bytes, 0))])

    return run


def prepare_memory(folder: Path, output: Path):
    from modeling_vlmoe import VLMoEForConditionalGeneration

    def run() -> None:
        model = VLMoEForConditionalGeneration.from_vision_text_pretrained(
            str(folder / "vision"), str(folder / "text"), text_moe={"num_experts": NUM_EXPERTS}, image_token_id=300
        )
        model.save_pretrained(output, max_shard_size="5GB")

    return run


def prepare_naive(folder: Path, output: Path):
    import torch
    from transformers import AutoModel, AutoModelForCausalLM

    from modeling_vlmoe import VLMoEConfig, VLMoEForConditionalGeneration

    def run() -> None:
        text = AutoModelForCausalLM.from_pretrained(folder / "text")
        vision = AutoModel.from_pretrained(folder / "vision")
        config = VLMoEConfig(
            text_config=text.config.to_dict(),
            vision_config=vision.config.to_dict(),
            text_moe={"num_experts": NUM_EXPERTS},
            image_token_id=300,
        )
        torch.set_default_dtype(torch.bfloat16)
        sparse = VLMoEForConditionalGeneration(config)
        torch.set_default_dtype(torch.float32)
        sparse.model.vision_tower.load_state_dict(vision.state_dict())
        sparse.lm_head.load_state_dict(text.lm_head.state_dict())
        rest = {name: tensor for name, tensor in text.model.state_dict().items() if ".mlp." not in name}
        sparse.model.language_model.load_state_dict(rest, strict=False)
        with torch.no_grad():
            for dense, layer in zip(text.model.layers, sparse.model.language_model.layers, strict=True):
                for expert in range(NUM_EXPERTS):
                    gate_up = torch.cat([dense.mlp.gate_proj.weight, dense.mlp.up_proj.weight])
                    layer.mlp.experts.gate_up_proj[expert] = gate_up
                    layer.mlp.experts.down_proj[expert] = dense.mlp.down_proj.weight
        sparse.save_pretrained(output, max_shard_size="5GB")

    return run


PREPARE = {
    "plain": prepare_plain,
    "upcycle": prepare_upcycle,
    "unproved": lambda folder, output: prepare_upcycle(folder, output, is_proved=False),
    "memory": prepare_memory,
    "naive": prepare_naive,
}


def private_memory(pid: int | str = "self") -> int:
    """RssAnon of a process in bytes; 0 when it is gone."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon")), 0)


def run_child(route: str, folder: Path, output: Path) -> None:
    """Imports, says so, works, and prints what that took."""
    if route != "plain":
        import modeling_vlmoe.conversion.upcycle
        import modeling_vlmoe.conversion.verify  # noqa: F401
    work = PREPARE[route](folder, output)
    print(json.dumps({"base": private_memory()}), flush=True)
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    print(json.dumps({"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}), flush=True)


def measure(route: str, folder: Path, output: Path) -> dict[str, float]:
    """Runs one route in its own process, sampling its private memory."""
    shutil.rmtree(output, ignore_errors=True)
    command = [sys.executable, __file__, "--folder", str(folder), "--output", str(output), "--child", route]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    peak = [0]

    def sample() -> None:
        while child.poll() is None:
            peak[0] = max(peak[0], private_memory(child.pid))
            time.sleep(SAMPLE_SECONDS)

    sampler = threading.Thread(target=sample)
    sampler.start()
    out, err = child.communicate()
    sampler.join()
    if child.returncode:
        raise RuntimeError(f"{route} failed:\n{err}")
    lines = [json.loads(line) for line in out.splitlines() if line.startswith("{")]
    size = sum(file.stat().st_size for file in output.glob("*"))
    shutil.rmtree(output)
    return {"wall": lines[1]["wall"], "cpu": lines[1]["cpu"], "memory": peak[0] - lines[0]["base"], "bytes": size}


def find_size(folder: Path) -> None:
    """How many bytes the output has, for the plain write."""
    from modeling_vlmoe.conversion import UpcycleArguments
    from modeling_vlmoe.conversion.planning import plan_upcycle

    args = UpcycleArguments(
        text_model=str(folder / "text"), vision_model=str(folder / "vision"), text_experts=NUM_EXPERTS
    )
    (folder / "size.json").write_text(json.dumps(plan_upcycle(args).mapping.num_bytes))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--folder", type=Path, required=True, help="Where parents are kept and outputs written and removed."
    )
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--routes", nargs="+", default=list(ROUTES), choices=ROUTES)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--child", choices=ROUTES)
    args = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    if args.child:
        run_child(args.child, args.folder, args.output)
        return
    save_parents(args.folder)
    find_size(args.folder)
    rows: dict[str, list[dict[str, float]]] = {route: [] for route in args.routes}
    for _ in range(args.runs):
        for route in args.routes:
            rows[route].append(measure(route, args.folder, args.folder / "output"))
    medians = {route: {key: median(row[key] for row in found) for key in found[0]} for route, found in rows.items()}
    two_layers = 2 * 2 * (3 * 2048 * 5632 + 2 * 2048 * 2048 + 2 * 2048 * 512 + 2 * 2048)
    print(f"{'route':10}{'wall s':>9}{'CPU s':>9}{'RssAnon MB':>12}{'GB':>7}{'x plain':>9}{'x faster than naive':>21}")
    for route, row in medians.items():
        ratios = [
            row["wall"] / medians[other]["wall"] if other in medians else float("nan") for other in ("plain", "naive")
        ]
        print(
            f"{route:10}{row['wall']:9.1f}{row['cpu']:9.1f}{row['memory'] / 1e6:12.0f}{row['bytes'] / 1e9:7.2f}"
            f"{ratios[0]:9.2f}{1 / ratios[1]:21.1f}"
        )
    print(f"Allowed private memory for upcycle: 200 MB + two dense layers = {200 + two_layers / 1e6:.0f} MB.")


if __name__ == "__main__":
    main()
