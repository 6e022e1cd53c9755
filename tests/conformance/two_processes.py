"""Run by `torchrun --nproc_per_node 2 two_processes.py SPREAD FOLDER [--broken|--host] [TRAINER ...]`: a JSON line
per cell.

SPREAD is `ddp` or `fsdp` (the host's own FSDP2; accelerate's is DDP on a CPU). FOLDER holds the tiny model.
With `--broken` a mistake is made that the cells must show; with `--host` FOLDER holds a host's VLM, sparse in place,
and its processor.
"""

import json
import os
import sys
import warnings
from dataclasses import asdict

import torch
import torch.distributed as dist


def main(spread: str, folder: str, names: list[str]) -> None:
    from transformers.distributed import DistributedConfig

    from modeling_vlmoe import VLMoEForConditionalGeneration
    from modeling_vlmoe.conversion.host_processors import open_processor
    from tests.conformance.broken import SPREAD_MISTAKE, made
    from tests.conformance.run import ACCUMULATED, Setting, measure, wrapped_layers
    from tests.conformance.trainers import KINDS

    torch.set_num_threads(1)

    def alone():
        return VLMoEForConditionalGeneration.from_pretrained(folder)

    def split():
        model = VLMoEForConditionalGeneration.from_pretrained(
            folder, distributed_config=DistributedConfig(fsdp_size=2)
        )
        assert wrapped_layers(model), "no layer is wrapped by FSDP"
        return model

    setting = Setting(ACCUMULATED | ({"ddp_find_unused_parameters": True} if spread == "ddp" else {}))
    mistake = SPREAD_MISTAKE if "--broken" in names else None
    reads = open_processor(folder, None) if "--host" in names else None
    make = split if spread == "fsdp" else alone
    for name in [name for name in names if not name.startswith("--")] or KINDS:
        with made(mistake):
            cell = measure(name, setting, "both", make=make, alone=alone(), reads=reads)
        if dist.get_rank() == 0:
            print("CELL " + json.dumps({"trainer": name} | asdict(cell)), flush=True)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    sys.path.insert(0, os.getcwd())
    dist.init_process_group("gloo")
    main(sys.argv[1], sys.argv[2], sys.argv[3:])
