"""How much memory a GPU has, by its name or as a number. No torch here: help reads these names."""

import re

# Memory in GB, by what people call them; of one that is sold with several sizes the smallest has the plain name.
GPUS: dict[str, int] = {
    "T4": 16,
    "V100": 16,
    "V100 32GB": 32,
    "P100": 16,
    "L4": 24,
    "A10": 24,
    "A10G": 24,
    "A30": 24,
    "A40": 48,
    "L40": 48,
    "L40S": 48,
    "RTX 3060": 12,
    "RTX 3080": 10,
    "RTX 3090": 24,
    "RTX 4060 Ti 16GB": 16,
    "RTX 4070": 12,
    "RTX 4080": 16,
    "RTX 4090": 24,
    "RTX 5070": 12,
    "RTX 5080": 16,
    "RTX 5090": 32,
    "RTX 6000 Ada": 48,
    "RTX A6000": 48,
    "RTX PRO 6000": 96,
    "A100": 40,
    "A100 80GB": 80,
    "H100": 80,
    "H200": 141,
    "B200": 180,
}
GB = 10**9


def _plain(name: str) -> str:
    return re.sub(r"nvidia|geforce|[\s_-]", "", name.lower())


def gpu_bytes(gpu: str) -> int:
    """The memory of a GPU.

    Args:
        gpu: its name, or a number of GB: "RTX 4090", "h100", "24", "24GB".

    Raises:
        ValueError: for another name, or no memory.
    """
    known = {_plain(name): size for name, size in GPUS.items()}
    size = re.fullmatch(r"(\d+(?:\.\d+)?)(?:gb|gib)?", _plain(gpu))
    number = float(size[1]) if size else known.get(_plain(gpu), 0)
    if not number:
        raise ValueError(f"--gpu is {gpu!r}; expected GB, as 24 or 24GB, or one of {', '.join(GPUS)}.")
    return int(number * GB)


def smallest_size(num_bytes: float) -> int | None:
    """The GB of the smallest of these GPUs that has so much memory; None where none has."""
    return min((size for size in GPUS.values() if size * GB >= num_bytes), default=None)
