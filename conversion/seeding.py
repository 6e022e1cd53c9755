"""One random generator per tensor, seeded by the run's seed and the tensor's name: order and threads do not matter."""

import hashlib

import torch


def tensor_generator(seed: int, name: str) -> torch.Generator:
    """The generator from which the tensor `name` is drawn."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
