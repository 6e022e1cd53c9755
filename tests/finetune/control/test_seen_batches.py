"""What a run has seen, and what a resumed one keeps of it."""

from types import SimpleNamespace

import torch

from modeling_vlmoe.finetune.control.seen_batches import SeenBatches, digest, read_seen, seen_path


def test_a_digest_tells_batches_apart_by_any_tensor():
    batch = {"input_ids": torch.tensor([[1, 2]]), "pixel_values": torch.zeros(1, 3)}
    assert digest(batch) == digest(dict(reversed(batch.items())))
    for name, other in (("input_ids", torch.tensor([[2, 1]])), ("pixel_values", torch.zeros(3, 1))):
        assert digest(batch | {name: other}) != digest(batch)
    assert digest({"pixel_values": torch.zeros(2, dtype=torch.bfloat16)})


def test_a_resumed_run_keeps_what_was_seen_before_its_checkpoint(tmp_path):
    """Two micro-batches per step; the last line was being written when the run was killed."""
    lines = [f'{{"step": {step}, "digest": "d{step}", "tokens": 1}}' for step in (0, 0, 1, 1, 2, 2)]
    seen_path(tmp_path).write_text("\n".join(lines) + '\n{"step": 3, "dig')
    args = SimpleNamespace(output_dir=str(tmp_path), process_index=0)
    SeenBatches().on_train_begin(args, SimpleNamespace(global_step=2), None)
    assert [one["step"] for one in read_seen(tmp_path)] == [0, 0, 1, 1]
    SeenBatches().on_train_begin(args, SimpleNamespace(global_step=0), None)
    assert read_seen(tmp_path) == []
    assert read_seen(tmp_path, 1) == []
