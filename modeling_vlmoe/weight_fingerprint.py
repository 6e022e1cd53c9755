"""Which weights a folder holds, told cheaply: a hash of every tensor's name, dtype, shape and a sample of its bytes.

The same weights have the same fingerprint however they are split into files. Receipts, histories and evaluations name
the weights that they are about by it. Training, resizing, merging and casting all change it.
"""

import hashlib
import json
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

from transformers.utils import ADAPTER_CONFIG_NAME, ADAPTER_SAFE_WEIGHTS_NAME

NUM_SAMPLES, SAMPLE_BYTES = 32, 128  # of each tensor, from its first byte to its last
HEADER_LENGTH_BYTES = 8  # safetensors: the header's length, the header, the tensors


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a folder's adapter, where it holds one, else of its model."""
    is_adapter = (folder / ADAPTER_CONFIG_NAME).is_file()
    return sorted(folder.glob(ADAPTER_SAFE_WEIGHTS_NAME if is_adapter else "model*.safetensors"))


def read_header(file: BinaryIO) -> tuple[dict[str, Any], int]:
    """A safetensors file's tensors, and where their bytes begin.

    Raises:
        ValueError: when it is no such file.
    """
    length = int.from_bytes(file.read(HEADER_LENGTH_BYTES), "little")
    header = file.read(length) if length < 1 << 30 else b""
    if not header.startswith(b"{") or len(header) != length:
        raise ValueError(f"{file.name} is corrupt or truncated. Save it again, or download it again.")
    tensors = json.loads(header)
    tensors.pop("__metadata__", None)
    return tensors, HEADER_LENGTH_BYTES + length


def count_parameters(folder: Path) -> int:
    """The parameters in a folder's weights, from the headers of its files."""
    count = 0
    for path in weight_files(folder):
        with path.open("rb") as file:
            count += sum(prod(tensor["shape"]) for tensor in read_header(file)[0].values())
    return count


def sample(file: BinaryIO, start: int, length: int) -> bytes:
    """Bytes of a tensor, evenly from its beginning to its end; all where there are few."""
    if length <= NUM_SAMPLES * SAMPLE_BYTES:
        file.seek(start)
        return file.read(length)
    found = bytearray()
    for number in range(NUM_SAMPLES):
        file.seek(start + (length - SAMPLE_BYTES) * number // (NUM_SAMPLES - 1))
        found += file.read(SAMPLE_BYTES)
    return bytes(found)


def fingerprint(folder: Path) -> str | None:
    """The fingerprint of a folder's weights; None where it holds none in safetensors."""
    hashes: dict[str, str] = {}
    for path in weight_files(folder):
        with path.open("rb") as file:
            tensors, begin = read_header(file)
            for name, tensor in tensors.items():
                first, last = tensor["data_offsets"]
                told = f"{name} {tensor['dtype']} {tensor['shape']} ".encode() + sample(
                    file, begin + first, last - first
                )
                hashes[name] = hashlib.sha256(told).hexdigest()
    if not hashes:
        return None
    return hashlib.sha256("\n".join(hashes[name] for name in sorted(hashes)).encode()).hexdigest()
