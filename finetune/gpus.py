"""How much memory a GPU has, by its name or as a number. No torch here: help reads these names."""

import math
import re
from dataclasses import dataclass

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
# Of a compute capability below 8.0: torch's `grouped_mm` does not run on them.
OLD = ("T4", "V100", "V100 32GB", "P100")
MOST_GB = 300  # a bare number above is none of GB: more likely a name
NUMBER = r"(\d+(?:\.\d+)?)"
NOT_OF_THE_NAME = r"nvidia|geforce|quadro|tesla|sxm\d?|pcie|hbm\d?e?|[\s_-]"


@dataclass(frozen=True)
class Device:
    """What a step runs on, as far as its memory depends on that.

    Attributes:
        kind: as torch calls it: "cpu", "cuda".
        is_old: whether torch's `grouped_mm` does not run on it.
    """

    kind: str
    is_old: bool = False


CPU, GPU = Device("cpu"), Device("cuda")


def _plain(name: str) -> str:
    return re.sub(NOT_OF_THE_NAME, "", name.lower())


def _find_name(words: str) -> tuple[str | None, str]:
    """The GPU that plain words name, with or without "RTX", and what they say behind its name."""
    known = {_plain(name): name for name in GPUS}
    known |= {plain.removeprefix("rtx"): name for plain, name in known.items()}
    begins = [plain for plain in known if words.startswith(plain)]
    longest = max(begins, key=len, default=None)
    return (None, words) if longest is None else (known[longest], words.removeprefix(longest))


def _read_gpu(gpu: str) -> tuple[str | None, float]:
    """The name of a GPU, if one is given, and its memory in bytes."""
    words = _plain(gpu)
    name, rest = _find_name(words)
    if name is not None and not rest:
        return name, GPUS[name] * GB
    size = None if name is None else re.fullmatch(rf"{NUMBER}(gb|gib)", rest)  # that size of it
    if size is None:
        name, size = None, re.fullmatch(rf"{NUMBER}(gb|gib)?", words)
    is_negative = gpu.strip().startswith("-")
    most = math.inf if size is not None and size[2] else MOST_GB
    if size is not None and not is_negative and 0 < float(size[1]) <= most:
        return name, float(size[1]) * (2**30 if size[2] == "gib" else GB)
    raise ValueError(
        f"--gpu is {gpu!r}; expected GB, as 24 or 24GB, up to {MOST_GB} without a unit, or one of {', '.join(GPUS)}."
    )


def gpu_bytes(gpu: str) -> int:
    """The memory of a GPU.

    Args:
        gpu: its name, or a number of GB: "RTX 4090", "4090", "h100", "A100 80GB", "24", "24GB".

    Raises:
        ValueError: for another name, or no such memory.
    """
    return int(_read_gpu(gpu)[1])


def gpu_device(gpu: str) -> Device:
    """What a GPU of this name, or of so many GB, is to a plan.

    Raises:
        ValueError: as `gpu_bytes`.
    """
    return Device("cuda", is_old=_read_gpu(gpu)[0] in OLD)


def smallest_size(num_bytes: float) -> int | None:
    """The GB of the smallest of these GPUs that has so much memory; None where none has."""
    return min((size for size in GPUS.values() if size * GB >= num_bytes), default=None)
