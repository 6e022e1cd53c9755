"""Run by `python killed.py POINT RECIPE KEY=VALUE...`: `vlmoe finetune`, killed as `kill -9` does at a point.

A point is WHERE:STAGE, of `POINTS`. "nowhere" runs to the end.
"""

import os
import shutil
import signal
import sys
from pathlib import Path

import torch
from transformers import Trainer

from modeling_vlmoe import register
from modeling_vlmoe.conversion import proved_writing
from modeling_vlmoe.finetune import train
from modeling_vlmoe.finetune.chain import run, whole_checkpoints
from modeling_vlmoe.finetune.recipe_runs import run_recipe
from modeling_vlmoe.finetune.scale import saving

STEP = 2  # of a stage's three: a checkpoint is there, and steps are left


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def is_of(folder, stage):
    return any(part.endswith(f"-{stage}") for part in Path(str(folder)).parts)


def halve(path):
    """A file as it is in the middle of its writing."""
    os.truncate(path, max(Path(path).stat().st_size // 2, 1))


def before(owner, name, is_here, then=die):
    """Calls `then` in the place of a function, the first time that it is here."""
    whole = getattr(owner, name)

    def watched(*args, **kwargs):
        if is_here(*args, **kwargs):
            then()
        return whole(*args, **kwargs)

    setattr(owner, name, watched)


def after(owner, name, is_here, then=die):
    """Calls `then` behind a function, with its arguments."""
    whole = getattr(owner, name)

    def watched(*args, **kwargs):
        result = whole(*args, **kwargs)
        if is_here(*args, **kwargs):
            then()
        return result

    setattr(owner, name, watched)


def in_a_step(stage):
    before(
        Trainer,
        "training_step",
        lambda self, *_: is_of(self.args.output_dir, stage) and self.state.global_step == STEP,
    )


def in_the_first_step(stage):
    before(Trainer, "training_step", lambda self, *_: is_of(self.args.output_dir, stage))


def in_a_checkpoint(stage):
    """Half of the optimizer's file is written."""
    save = torch.save

    def half(values, path, *args, **kwargs):
        save(values, path, *args, **kwargs)
        if is_of(path, stage) and f"checkpoint-{STEP}" in str(path) and "optimizer" in str(path):
            halve(path)
            die()

    torch.save = half


def before_the_mark(stage):
    """The checkpoint is whole, and nothing says so."""
    before(
        whole_checkpoints, "mark_whole", lambda folder: is_of(folder, stage) and folder.name == f"checkpoint-{STEP}"
    )


def in_the_mark(stage):
    """Half of what says so is written."""
    in_an_atomic_write(lambda path: is_of(path, stage) and path.name == whole_checkpoints.FILES_NAME)


def in_the_removal_of_a_checkpoint(stage):
    """`save_total_limit` has removed one file of the oldest one."""
    remove = shutil.rmtree

    def some(path, *args, **kwargs):
        if is_of(path, stage) and Path(path).name == "checkpoint-1":
            next(file for file in Path(path).iterdir() if file.is_file()).unlink()
            die()
        remove(path, *args, **kwargs)

    shutil.rmtree = some


def in_the_result(stage):
    """Half of the trained weights are written."""
    save = saving.save_finetuned

    def half(model, processor, folder, *args):
        if not is_of(folder, stage):
            return save(model, processor, folder, *args)
        model.save_pretrained(folder)
        for path in Path(folder).glob("*.safetensors"):
            halve(path)
        (Path(folder) / "training_history.json").write_text("[{")
        return die()

    saving.save_finetuned = half


def in_the_merging(stage):
    """Half of the merged model is written."""

    def half(adapter, output, **kwargs):
        output.mkdir(parents=True)
        (output / "model.safetensors").write_bytes(b"{")
        die()

    train.merge_adapter = half


def in_an_upcycling(stage):
    """The weights are written into a folder that has no name yet."""
    after(proved_writing, "write_checkpoint", lambda folder, *_: is_of_partial(folder, stage))


def before_the_proof_is_done(stage):
    before(proved_writing, "write_receipt", lambda folder, *_: is_of_partial(folder, stage))


def is_of_partial(folder, stage):
    return f"-{stage}.partial-" in str(folder)


def in_an_atomic_write(is_here):
    replace = Path.replace

    def half(self, target):
        if is_here(Path(target)):
            halve(self)
            die()
        return replace(self, target)

    Path.replace = half


def in_the_record_of_its_begin(stage):
    in_a_record(stage, "begin")


def in_the_record_of_its_end(stage):
    """The stage's result is whole, and nothing says so."""
    in_a_record(stage, "finish")


def in_a_record(stage, name):
    inside = []
    before(run, name, lambda chain, one, *_: bool(one.name == stage and inside.append(one)))
    in_an_atomic_write(lambda path: inside and path.name == "chain.json")


def between_the_stages(stage):
    """Behind a stage that is finished, before the next begins."""
    after(run, "finish", lambda chain, one, *_: one.name == stage)


POINTS = {
    one.__name__: one
    for one in (
        in_the_record_of_its_begin,
        in_an_upcycling,
        before_the_proof_is_done,
        in_the_first_step,
        in_a_step,
        in_a_checkpoint,
        before_the_mark,
        in_the_mark,
        in_the_removal_of_a_checkpoint,
        in_the_result,
        in_the_merging,
        in_the_record_of_its_end,
        between_the_stages,
    )
}


def main(point, recipe, *words):
    torch.set_num_threads(1)
    register()
    where, _, stage = point.partition(":")
    if where != "nowhere":
        POINTS[where](stage)
    print(run_recipe(recipe, words, say=print), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
