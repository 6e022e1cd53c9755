"""Safetensors as a stream: read by memory map, written tensor by tensor.

Reading costs file pages, never private memory; a tensor that is written E times is E writes of the same pages. Files
are hashed while they are written.

    reader = CheckpointReader(folder)
    specs = [TensorSpec(name, reader.dtype(name), reader.shape(name)) for name in reader.names]
    hashes = write_checkpoint(out, specs, lambda name: [reader.tensor(name)])
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
from transformers.utils import logging as host_logging

from .page_flow import MappedSpan
from .written_file import WrittenFile

SHARD_BYTES = 5 * 10**9
CAST_ROWS_BYTES = 16 * 2**20  # a cast happens in row blocks of about this size
PICKLE_PATTERNS = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
DTYPE_CODES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
DTYPES_BY_CODE = {code: dtype for dtype, code in DTYPE_CODES.items()}


def read_json(path: Path) -> dict:
    """Reads a JSON file; what is missing or broken is named."""
    if not path.is_file():
        raise ValueError(f"{path.parent} has no {path.name}. Add it.")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON. Mend this: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds {type(values).__name__}; expected a JSON object.")
    return values


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint folder, as the host looks for them: one, or an index and its shards."""
    if (folder / SAFE_WEIGHTS_NAME).is_file():
        return [folder / SAFE_WEIGHTS_NAME]
    index = folder / SAFE_WEIGHTS_INDEX_NAME
    if index.is_file():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise ValueError(f"{index} has no weight_map. Download it again.")
        files = [folder / name for name in sorted(set(weight_map.values()))]
        if missing := [file.name for file in files if not file.is_file()]:
            raise ValueError(f"{index} names shards that are not in {folder}: {', '.join(missing)}. Add them.")
        return files
    if pickles := sorted(file.name for pattern in PICKLE_PATTERNS for file in folder.glob(pattern)):
        raise ValueError(
            f"{folder} has only pickle weights ({', '.join(pickles)}), which can run code and are never loaded. "
            "Save the model as safetensors first."
        )
    raise ValueError(f"{folder} has no {SAFE_WEIGHTS_NAME} and no {SAFE_WEIGHTS_INDEX_NAME}. Add the weights.")


def tensor_offsets(file: Path) -> dict[str, int]:
    """Where each tensor of a safetensors file begins, in bytes from the file's beginning."""
    with file.open("rb") as handle:
        length = int.from_bytes(handle.read(8), "little")
        header = json.loads(handle.read(length))
    return {name: 8 + length + one["data_offsets"][0] for name, one in header.items() if name != "__metadata__"}


class CheckpointReader:
    """The tensors of a checkpoint folder by name, memory-mapped.

    Args:
        folder: Where the (sharded) safetensors are.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.files = weight_files(self.folder)
        self._home: dict[str, safe_open] = {}
        self._place: dict[str, tuple[Path, int]] = {}
        for file in self.files:
            try:
                handle = safe_open(file, framework="pt")
            except (SafetensorError, OSError) as error:
                raise ValueError(f"{file} is corrupt or truncated. Download it again: {error}") from error
            for name, offset in tensor_offsets(file).items():
                if name in self._home:
                    raise ValueError(
                        f"{self.folder} holds the tensor {name} twice, the second time in {file.name}. Remove one."
                    )
                self._home[name], self._place[name] = handle, (file, offset)
        self._check_index()

    def _check_index(self) -> None:
        index = self.folder / SAFE_WEIGHTS_INDEX_NAME
        if self.files[0].name == SAFE_WEIGHTS_NAME or not index.is_file():
            return
        if missing := sorted(set(read_json(index)["weight_map"]) - set(self._home)):
            raise ValueError(
                f"{index} names tensors that its shards do not hold: {', '.join(missing[:5])}. Download them again."
            )

    @property
    def names(self) -> list[str]:
        return list(self._home)

    def _slice(self, name: str):
        return self._home[name].get_slice(name)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._slice(name).get_shape())

    def dtype(self, name: str) -> torch.dtype:
        code = self._slice(name).get_dtype()
        if code not in DTYPES_BY_CODE:
            raise ValueError(
                f"{name} in {self.folder} is stored as {code}, which is a quantised format: not supported. Give "
                "the full-precision parent."
            )
        return DTYPES_BY_CODE[code]

    def tensor(self, name: str) -> Tensor:
        """The tensor, mapped from its file: reading it touches pages, holding it costs nothing."""
        return self._home[name].get_tensor(name)

    def raw(self, name: str, start: int, length: int) -> bytes:
        """Some bytes of a tensor, read without what lies around them (a map reads ahead, which costs milliseconds)."""
        file, offset = self._place[name]
        with file.open("rb", buffering=0) as handle:
            handle.seek(offset + start)
            return handle.read(length)

    def span(self, name: str) -> MappedSpan:
        """Where a tensor is, so that its pages can be let go of."""
        return MappedSpan(self.tensor(name), *self._place[name])


def row_blocks(tensor: Tensor) -> Iterator[Tensor]:
    """Cuts a tensor along its first dimension into blocks of about `CAST_ROWS_BYTES`."""
    if tensor.ndim == 0:
        yield tensor
        return
    row_bytes = max(1, tensor[:1].numel() * tensor.element_size())
    yield from tensor.split(max(1, CAST_ROWS_BYTES // row_bytes))


def cast_blocks(tensor: Tensor, dtype: torch.dtype) -> Iterator[Tensor]:
    """The tensor in `dtype`: itself when it has it, else cast block by block, so that no second copy exists."""
    if tensor.dtype == dtype:
        yield tensor
    else:
        yield from (block.to(dtype) for block in row_blocks(tensor))


@dataclass(frozen=True)
class TensorSpec:
    """What the header of a file says of one tensor."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


def plan_shards(specs: Iterable[TensorSpec], max_bytes: int = SHARD_BYTES) -> dict[str, list[TensorSpec]]:
    """File names, as the host gives them, and what goes into each.

    Within a file wider dtypes come first, so that every tensor is aligned (safetensors' own order).
    """
    shards: list[list[TensorSpec]] = [[]]
    filled = 0
    for spec in specs:
        if shards[-1] and filled + spec.num_bytes > max_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(spec)
        filled += spec.num_bytes
    aligned = [sorted(shard, key=lambda spec: -spec.dtype.itemsize) for shard in shards]
    if len(aligned) == 1:
        return {SAFE_WEIGHTS_NAME: aligned[0]}
    stem = SAFE_WEIGHTS_NAME.removesuffix(".safetensors")
    return {f"{stem}-{i:05d}-of-{len(aligned):05d}.safetensors": shard for i, shard in enumerate(aligned, start=1)}


def encode_header(specs: Iterable[TensorSpec]) -> bytes:
    """The head of a safetensors file: its length and a JSON of names, types, shapes and offsets."""
    header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for spec in specs:
        end = offset + spec.num_bytes
        header[spec.name] = {
            "dtype": DTYPE_CODES[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode("utf-8")
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def raw_bytes(tensor: Tensor) -> memoryview:
    """The memory of a tensor, without a copy where it is contiguous."""
    return memoryview(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]


def write_checkpoint(
    folder: Path,
    specs: list[TensorSpec],
    blocks: Callable[[str], Iterable[Tensor]],
    max_shard_bytes: int = SHARD_BYTES,
) -> dict[str, str]:
    """Writes safetensors, sharded with an index where they are large, without ever holding a whole target tensor.

    Args:
        folder: Where to write; it exists.
        specs: The tensors, in their order.
        blocks: Gives, for a tensor's name, the blocks that follow one another in its memory.
        max_shard_bytes: Where a new shard begins.

    Returns:
        The sha256 of every file written, by file name.

    Raises:
        OSError: when something cannot be written.
    """
    shards = plan_shards(specs, max_shard_bytes)
    total = sum(spec.num_bytes for spec in specs)
    hashes: dict[str, str] = {}
    with host_logging.tqdm(total=total, unit="B", unit_scale=True, desc="Writing", disable=None) as progress:
        for file_name, shard in shards.items():
            with WrittenFile(folder / file_name) as file:
                file.write(encode_header(shard))
                for spec in shard:
                    written = 0
                    for block in blocks(spec.name):
                        assert block.dtype == spec.dtype, f"{spec.name}: {block.dtype} given for {spec.dtype}"
                        written += file.write(raw_bytes(block))
                    assert written == spec.num_bytes, f"{spec.name}: {written} bytes given for {spec.num_bytes}"
                    progress.update(written)
                hashes[file_name] = file.close()
    if len(shards) > 1:
        hashes[SAFE_WEIGHTS_INDEX_NAME] = write_index(folder, shards, total)
    return hashes


def write_index(folder: Path, shards: dict[str, list[TensorSpec]], total_bytes: int) -> str:
    """Writes the index of a sharded checkpoint; returns its sha256."""
    weight_map = {spec.name: file_name for file_name, shard in shards.items() for spec in shard}
    metadata = {
        "total_parameters": sum(prod(spec.shape) for shard in shards.values() for spec in shard),
        "total_size": total_bytes,
    }
    text = json.dumps({"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))}, indent=2) + "\n"
    (folder / SAFE_WEIGHTS_INDEX_NAME).write_text(text, encoding="utf-8")
    return hashlib.sha256(text.encode("utf-8")).hexdigest()
