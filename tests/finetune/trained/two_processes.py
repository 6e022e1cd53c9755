"""Run by `torch.distributed.run` in two processes: a recipe with rates of parts, under DDP or FSDP2.

Arguments: the recipe's settings as JSON.
"""

import json
import sys

import torch

from modeling_vlmoe.finetune import finetune
from modeling_vlmoe.finetune.arguments import parse_settings

torch.set_num_threads(1)
finetune(parse_settings(json.loads(sys.argv[1])))
