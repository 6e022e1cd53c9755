import errno
import fcntl
import hashlib
import json
import os
import random

import pytest
import torch
from safetensors.torch import load_file, save_file

from modeling_vlmoe.conversion.streaming import (
    CheckpointReader,
    TensorSpec,
    cast_blocks,
    plan_shards,
    write_checkpoint,
)
from modeling_vlmoe.conversion.written_file import BUFFER_BYTES, NUM_BUFFERS, WrittenFile
from tests import tiny


def some_tensors():
    generator = torch.Generator().manual_seed(0)
    return {
        "a.weight": torch.randn(5, 3, generator=generator).bfloat16(),
        "b.weight": torch.randn(7, 2, generator=generator),
        "c": torch.arange(3),
        "d": torch.tensor(2.5),
    }


def write(folder, tensors, **options):
    folder.mkdir(exist_ok=True)
    specs = [TensorSpec(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()]
    return write_checkpoint(folder, specs, lambda name: [tensors[name]], **options)


@pytest.mark.parametrize("shard_bytes", [10**9, 90, 1])
def test_what_is_written_is_read_back_by_safetensors_and_by_us(tmp_path, shard_bytes):
    tensors = some_tensors()
    hashes = write(tmp_path / "x", tensors, max_shard_bytes=shard_bytes)
    files = sorted((tmp_path / "x").glob("*.safetensors"))
    by_safetensors = {name: tensor for file in files for name, tensor in load_file(file).items()}
    reader = CheckpointReader(tmp_path / "x")
    assert set(reader.names) == set(by_safetensors) == set(tensors)
    for name, tensor in tensors.items():
        assert torch.equal(by_safetensors[name], tensor)
        assert torch.equal(reader.tensor(name), tensor)
        assert (reader.dtype(name), reader.shape(name)) == (tensor.dtype, tuple(tensor.shape))
    assert hashes == {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in (tmp_path / "x").iterdir()}


def test_shards_are_named_as_the_host_names_them_and_have_an_index(tmp_path):
    write(tmp_path / "x", some_tensors(), max_shard_bytes=90)
    index = json.loads((tmp_path / "x" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {f"model-{i:05d}-of-00002.safetensors" for i in (1, 2)}
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in some_tensors().values())


def test_tensors_within_a_file_are_aligned():
    specs = [TensorSpec(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in some_tensors().items()]
    (shard,) = plan_shards(specs).values()
    assert [spec.dtype.itemsize for spec in shard] == [8, 4, 4, 2]


def test_a_stack_is_written_as_repeated_writes_of_one_tensor(tmp_path):
    (tmp_path / "x").mkdir()
    dense = torch.randn(4, 3)
    spec = TensorSpec("experts", torch.float32, (3, 8, 3))
    write_checkpoint(tmp_path / "x", [spec], lambda name: [dense, dense] * 3)
    stacked = load_file(tmp_path / "x" / "model.safetensors")["experts"]
    assert torch.equal(stacked, torch.cat([dense, dense]).expand(3, 8, 3))


def test_a_cast_happens_in_blocks(monkeypatch):
    monkeypatch.setattr("modeling_vlmoe.conversion.streaming.CAST_ROWS_BYTES", 64)
    tensor = torch.randn(100, 8)
    blocks = list(cast_blocks(tensor, torch.bfloat16))
    assert torch.equal(torch.cat(blocks), tensor.bfloat16())
    assert len(blocks) == tensor.nbytes / 64


def test_reading_a_tensor_takes_no_private_memory(tmp_path):
    def private_memory():
        with open("/proc/self/status") as status:
            return next(int(line.split()[1]) for line in status if line.startswith("RssAnon"))

    save_file({"big": torch.ones(2048, 4096)}, tmp_path / "model.safetensors")
    before = private_memory()
    tensor = CheckpointReader(tmp_path).tensor("big")
    assert tensor.sum() == 2048 * 4096
    assert private_memory() - before < 4 * 1024  # kB; the tensor has 32 MB


def test_a_tensor_that_is_let_go_of_can_be_read_again(tmp_path):
    dense = {"a": torch.randn(3, 5), "big": torch.randn(1024, 1025), "b": torch.randn(7)}
    write(tmp_path / "x", dense)
    reader = CheckpointReader(tmp_path / "x")
    tensor, span = reader.tensor("big"), reader.span("big")
    for _ in range(2):
        assert torch.equal(tensor, dense["big"])
        span.let_go()
    assert all(torch.equal(reader.tensor(name), value) for name, value in dense.items())


@pytest.mark.parametrize("is_direct", [True, False])
@pytest.mark.parametrize("size", [0, 1, 4096, BUFFER_BYTES, NUM_BUFFERS * BUFFER_BYTES + 4097])
def test_a_file_holds_what_was_given_by_pieces(tmp_path, monkeypatch, size, is_direct):
    if not is_direct:

        def refuse(descriptor, data):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

        write = os.write
        monkeypatch.setattr("os.write", lambda d, data: (refuse if is_opened_directly(d) else write)(d, data))
    data = random.Random(0).randbytes(size)
    file = WrittenFile(tmp_path / "file")
    with file:
        for start in range(0, size, 10**7):
            file.write(data[start : start + 10**7])
        digest = file.close()
    assert (tmp_path / "file").read_bytes() == data
    assert digest == hashlib.sha256(data).hexdigest()


def is_opened_directly(descriptor):
    return bool(fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT)


def test_what_goes_wrong_while_a_file_is_written_is_raised(tmp_path, monkeypatch):
    file = WrittenFile(tmp_path / "file")

    def fail(descriptor, data):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr("os.write", fail)
    with file:
        file.write(bytes(BUFFER_BYTES))
        with pytest.raises(OSError, match=os.strerror(errno.EIO)):
            file.close()
    with pytest.raises(OSError, match=os.strerror(errno.EBADF)):
        os.fstat(file._descriptor)


def test_raises_when_a_file_is_truncated(tmp_path):
    tiny.save_text_parent(tmp_path, "llama")
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"model.safetensors is corrupt or truncated"):
        CheckpointReader(tmp_path)


def test_raises_when_a_file_is_no_safetensors(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"\xff" * 1000)
    with pytest.raises(ValueError, match=r"model.safetensors is corrupt or truncated"):
        CheckpointReader(tmp_path)


def test_raises_when_a_file_is_empty(tmp_path):
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(ValueError, match=r"model.safetensors is corrupt or truncated"):
        CheckpointReader(tmp_path)


def test_raises_when_a_shard_is_missing(tmp_path):
    write(tmp_path / "x", some_tensors(), max_shard_bytes=90)
    (tmp_path / "x" / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ValueError, match=r"names shards that are not in .*: model-00002-of-00002.safetensors"):
        CheckpointReader(tmp_path / "x")


def test_raises_when_the_index_names_a_tensor_that_no_shard_holds(tmp_path):
    write(tmp_path / "x", some_tensors(), max_shard_bytes=90)
    index = tmp_path / "x" / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["nowhere"] = "model-00001-of-00002.safetensors"
    index.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"names tensors that its shards do not hold: nowhere"):
        CheckpointReader(tmp_path / "x")


def test_raises_when_the_index_is_no_json(tmp_path):
    (tmp_path / "model.safetensors.index.json").write_text("{")
    with pytest.raises(ValueError, match=r"index.json is not valid JSON"):
        CheckpointReader(tmp_path)


def test_raises_when_there_are_only_pickle_weights_which_are_not_loaded(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'exit 1'\ntR.")
    with pytest.raises(ValueError, match=r"only pickle weights \(pytorch_model.bin\)"):
        CheckpointReader(tmp_path)


def test_raises_when_there_are_no_weights(tmp_path):
    with pytest.raises(ValueError, match=r"has no model.safetensors"):
        CheckpointReader(tmp_path)


def test_raises_when_weights_are_stored_in_a_quantised_format(tmp_path):
    save_file({"x": torch.zeros(2, 2).to(torch.float8_e4m3fn)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"x in .* is stored as F8_E4M3"):
        CheckpointReader(tmp_path).dtype("x")
