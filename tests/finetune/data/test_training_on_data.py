"""Runs on forms, mixtures and streams: what is trained, what a resumed run goes on with, what is refused."""

import json
import os
import pickle
import subprocess
import sys
from itertools import islice
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageTextToText

from modeling_vlmoe.finetune import ChatCollator, build_trainer, finetune, load_chat_data, load_finetuned
from modeling_vlmoe.finetune.arguments import parse_recipe
from modeling_vlmoe.finetune.checkpoints import write_settings
from modeling_vlmoe.finetune.training_data import check_same_order, go_on, load_datasets, plain_worker_errors
from modeling_vlmoe.model_cards.facts import read_runs
from tests.finetune.data import forms
from tests.finetune.data.test_streams import answers, write_shards

SPAWNED = """
import sys, torch
from torch.utils.data import DataLoader
import modeling_vlmoe
from modeling_vlmoe.finetune import ChatCollator, load_chat_data
from transformers import AutoProcessor

if __name__ == "__main__":
    rows, collate = load_chat_data(sys.argv[1]), ChatCollator(AutoProcessor.from_pretrained(sys.argv[2]))
    spawned = DataLoader(rows, 3, collate_fn=collate, num_workers=1, multiprocessing_context="spawn")
    for batch, wanted in zip(spawned, DataLoader(rows, 3, collate_fn=collate), strict=True):
        assert all(torch.equal(batch[name], wanted[name]) for name in wanted)
    print("the same")
"""


def assert_same_weights(first, second):
    wanted, found = (load_finetuned(folder)[0].state_dict() for folder in (first, second))
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=0, msg=name)


def stream_settings(source, **given):
    settings = {"data": str(source), "streaming": True, "shuffle_buffer": 3, "per_device_train_batch_size": 2}
    return settings | {"max_steps": 4, "gradient_accumulation_steps": 2, "save_steps": 2} | given


@pytest.mark.slow
def test_a_resumed_run_on_a_stream_is_the_uninterrupted_one(arguments, pictures, tmp_path):
    """Sixteen batches of eleven rows: the interruption is in a later pass; the resumed run has workers."""
    settings = stream_settings(write_shards("tar", tmp_path / "data"), save_total_limit=None)
    settings |= {"eval_data": str(pictures / "test.jsonl"), "eval_strategy": "steps", "eval_steps": 2}
    whole = finetune(arguments(**settings, output_dir=str(tmp_path / "whole")))
    workers = {"dataloader_num_workers": 2, "dataloader_prefetch_factor": 3}
    resumed = finetune(
        arguments(
            **settings,
            **workers,
            output_dir=str(tmp_path / "resumed"),
            resume_from_checkpoint=str(whole / "checkpoint-2"),
        )
    )
    assert_same_weights(whole, resumed)


def test_a_stream_goes_on_behind_the_last_row_that_was_trained_on(arguments, tmp_path):
    args = arguments(**stream_settings(write_shards("tar", tmp_path / "data")))
    write_settings(tmp_path, args)
    whole = answers(islice(load_datasets(args)[0], 20))
    (checkpoint := tmp_path / "checkpoint-2").mkdir()
    (checkpoint / "trainer_state.json").write_text(json.dumps({"global_step": 2, "train_batch_size": 2}))
    stream = load_datasets(args)[0]
    go_on(stream, args, str(checkpoint))
    assert answers(islice(stream, 12)) == whole[8:]
    (checkpoint / "trainer_state.json").write_text(json.dumps({"global_step": 2, "train_batch_size": 4}))
    with pytest.raises(ValueError, match=r"had batches of 4 rows a process, but they are of 2, .* give the"):
        go_on(stream, args, str(checkpoint))
    (checkpoint / "trainer_state.json").write_text("{}")
    with pytest.raises(ValueError, match="does not say how far the run came"):
        go_on(stream, args, str(checkpoint))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"gradient_accumulation_steps": 4}, "had gradient_accumulation_steps=2, but it is 4, .* of then"),
        ({"seed": 7}, "had seed=42, but it is 7"),
        ({"shuffle_buffer": 4}, "had shuffle_buffer=3, but it is 4"),
        ({"data": "other"}, r"had data=\['data'\], but it is \['other'\]"),
    ],
)
def test_raises_when_a_stream_would_go_on_in_another_order(given, message, arguments, tmp_path):
    settings = stream_settings(write_shards("tar", tmp_path / "data"))
    write_settings(tmp_path, arguments(**settings))
    (checkpoint := tmp_path / "checkpoint-2").mkdir()
    (checkpoint / "trainer_state.json").write_text(json.dumps({"global_step": 2, "train_batch_size": 2}))
    stream = load_datasets(arguments(**settings))[0]
    with pytest.raises(ValueError, match=message):
        go_on(stream, arguments(**settings | given), str(checkpoint))
    assert stream.first_row == 0


def test_raises_when_a_stream_would_go_on_with_other_processes_or_without_its_settings(arguments, tmp_path):
    args = arguments(**stream_settings(write_shards("tar", tmp_path / "data")))
    (checkpoint := tmp_path / "checkpoint-2").mkdir()
    with pytest.raises(
        ValueError, match=r"nobody knows in which order .*; give a checkpoint in the folder of its run"
    ):
        check_same_order(args, checkpoint)
    write_settings(tmp_path, args)
    check_same_order(args, checkpoint)
    for number in range(2):
        (checkpoint / f"rng_state_{number}.pth").touch()
    with pytest.raises(ValueError, match=r"had 2 processes, but there are 1, .* give as many as then"):
        check_same_order(args, checkpoint)


def test_raises_when_a_run_that_goes_on_reads_in_another_order(arguments, tmp_path):
    """Before the settings of the interrupted run are written over."""
    settings = stream_settings(write_shards("tar", tmp_path / "data"), output_dir=str(tmp_path / "run"))
    (checkpoint := tmp_path / "run" / "checkpoint-2").mkdir(parents=True)
    (checkpoint / "trainer_state.json").write_text(json.dumps({"global_step": 2, "train_batch_size": 2}))
    write_settings(tmp_path / "run", arguments(**settings))
    with pytest.raises(ValueError, match="had seed=42, but it is 7"):
        finetune(arguments(**settings, seed=7, resume_from_checkpoint="true"))


def loaded_batches(args, processor, rows, num_batches):
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_pretrained(args.model)
    loader = build_trainer(model, processor, rows, args).get_train_dataloader()
    return list(islice(loader, num_batches))


@pytest.mark.parametrize("streaming", [False, True], ids=["map", "stream"])
def test_workers_and_prefetching_give_the_trainer_the_same_batches(streaming, arguments, processor, tmp_path):
    settings = stream_settings(write_shards("tar", tmp_path / "data"))
    if not streaming:
        settings = {name: value for name, value in settings.items() if name not in ("streaming", "shuffle_buffer")}
    workers = {"dataloader_num_workers": 2, "dataloader_prefetch_factor": 2}
    found = []
    for given in ({}, workers):
        args = arguments(**settings, **given)
        found.append(loaded_batches(args, processor, load_datasets(args)[0], 5))
    for batch, wanted in zip(*found, strict=True):
        assert batch.keys() == wanted.keys()
        assert all(torch.equal(batch[name], wanted[name]) for name in wanted)


def test_a_collator_can_be_sent_to_a_worker(processor, pictures):
    rows = list(load_chat_data(pictures, "train"))
    again = pickle.loads(pickle.dumps(ChatCollator(processor, 200)))
    batch, wanted = again(rows), ChatCollator(processor)(rows)
    assert all(torch.equal(batch[name], wanted[name]) for name in wanted)


@pytest.mark.slow
def test_workers_may_be_spawned(base, tmp_path):
    script = tmp_path / "spawned.py"
    script.write_text(SPAWNED)
    source = forms.write("jsonl", tmp_path / "data", forms.rows_of("llava"))
    done = subprocess.run(
        [sys.executable, script, source, base], capture_output=True, text=True, timeout=300, env=os.environ
    )
    assert done.stdout == "the same\n", done.stderr[-2000:]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_bad_image_in_a_stream_is_one_message(num_workers, arguments, tmp_path):
    path = forms.write("jsonl", tmp_path / "data", [forms.as_messages(forms.ONE)])
    (tmp_path / "data" / "red.png").write_bytes(b"\x89PNG\r\n\x1a\nnothing")
    given = stream_settings(path, dataloader_num_workers=num_workers, output_dir=str(tmp_path / "out"))
    with pytest.raises(ValueError, match=r"\ARow 1 of rows.jsonl: cannot read the image .*Mend it") as raised:
        finetune(arguments(**given))
    assert "Traceback" not in str(raised.value)


def test_other_errors_stay_as_they_are():
    with pytest.raises(ValueError, match=r"\Amine\Z"), plain_worker_errors():
        raise ValueError("mine")


def test_a_mixture_of_forms_is_trained_and_told_of(arguments, tmp_path):
    asked = forms.write("tar", tmp_path / "asked", forms.rows_of("vqa"))
    told = forms.write("jsonl", tmp_path / "told", forms.rows_of("llava"))
    folder = finetune(
        arguments(data=f"{asked},{told}", data_weights="1,2", save_strategy="no", output_dir=str(tmp_path / "out"))
    )
    (run,) = read_runs(folder)
    assert run["data"]["name"] == "rows.tar + rows.jsonl"
    assert [source["name"] for source in run["data"]["sources"]] == ["rows.tar", "rows.jsonl"]
    assert run["data"]["draws"] >= 7
    assert run["settings"]["data_weights"] == [1.0, 2.0]
    assert "rows.tar + rows.jsonl" in (folder / "README.md").read_text()
    again = parse_recipe(folder / "finetune_settings.yaml")
    assert (again.data, again.data_weights) == ([str(asked), str(told)], [1.0, 2.0])


def test_weights_are_for_training_alone(arguments, tmp_path):
    for name in ("a", "b"):
        for split in ("train", "test"):
            path = forms.write("jsonl", tmp_path / name, forms.rows_of("vqa"))
            path.rename(path.with_name(f"{split}.jsonl"))
    given = {"data": [str(tmp_path / "a"), str(tmp_path / "b")], "data_weights": [1, 9], "eval_split": "test"}
    train, test = load_datasets(arguments(**given))
    assert len(train) > len(test) == 6


def test_one_source_stays_a_name_and_may_have_a_comma(arguments, tmp_path):
    path = forms.write("jsonl", tmp_path / "a, b", forms.rows_of("captions"))
    args = arguments(data=str(path), question="Which colour?")
    assert args.data == str(path)
    assert load_datasets(args)[0][0]["messages"][0]["content"][1]["text"] == "Which colour?"
    assert arguments(data=[str(path)]).data == str(path)


def test_the_trainer_reads_from_image_folder_in_a_form_that_is_named(arguments, tmp_path):
    path = forms.write("jsonl", tmp_path / "data", [forms.as_vqa(forms.ONE) | {"caption": "Red."}])
    (tmp_path / "rows.jsonl").write_text(path.read_text())
    images = {"image_folder": str(tmp_path / "data"), "data": str(tmp_path / "rows.jsonl")}
    rows = load_datasets(arguments(**images, data_format="captions"))[0]
    assert rows[0]["messages"][1]["content"][0]["text"] == "Red."
    assert rows[0]["images"][0]["path"] == str(tmp_path / "data" / "red.png")
    with pytest.raises(ValueError, match="may be vqa or captions"):
        load_datasets(arguments(**images))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"max_steps": -1}, "streaming is on, but nobody knows how long a stream is; give max_steps"),
        ({"data": "a,b"}, "streaming is on for 2 data, .* give data_weights"),
        ({"data": "a,b", "data_weights": "1"}, r"data_weights is \[1.0\] for 2 data"),
        ({"data_weights": "1,2"}, "data_weights are for several data"),
        ({"shuffle_buffer": -1}, "shuffle_buffer is -1; expected 0"),
        (
            {"streaming": False, "shuffle_buffer": 3},
            "shuffle_buffer is 3, but only streams have a buffer; give stream",
        ),
        ({"eval_data": "a,b", "max_steps": 1}, "eval_data is a,b, but it takes one source; name one"),
        ({"data_format": "coco"}, "data_format is 'coco'; expected one of auto"),
        ({"question": " "}, "question is empty"),
    ],
)
def test_raises_when_settings_of_data_do_not_go_together(given, message, arguments):
    with pytest.raises(ValueError, match=message):
        arguments(**({"streaming": True} | given))


def test_raises_when_force_would_empty_what_a_stream_may_read(arguments, tmp_path):
    settings = stream_settings(write_shards("jsonl", tmp_path / "data"), output_dir=str(tmp_path / "out"))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "finetune_settings.yaml").write_text("{}")
    with pytest.raises(ValueError, match=r"force=true would empty .*out, but with streaming nobody knows"):
        finetune(arguments(**settings, force=True))


TWO = """
import sys
from itertools import islice
from pathlib import Path
import torch
from accelerate import PartialState
import modeling_vlmoe
from modeling_vlmoe.finetune import build_trainer
from modeling_vlmoe.finetune.arguments import parse_settings
from modeling_vlmoe.finetune.training_data import load_datasets
from transformers import AutoModelForImageTextToText, AutoProcessor

base, data, out, size = sys.argv[1:]
args = parse_settings(
    {"model": base, "data": data, "output_dir": out, "streaming": True, "shuffle_buffer": 3, "max_steps": 3,
     "per_device_train_batch_size": size, "use_cpu": True, "report_to": "none", "dataloader_num_workers": 1})
model, processor = AutoModelForImageTextToText.from_pretrained(base), AutoProcessor.from_pretrained(base)
loader = build_trainer(model, processor, load_datasets(args)[0], args).get_train_dataloader()
learnt = [[processor.decode(row[row != -100]) for row in batch["labels"]] for batch in islice(loader, 3)]
Path(out, f"{args.process_index}.txt").write_text(repr(learnt))
"""


@pytest.mark.slow
def test_two_processes_share_the_batches_of_one(base, tmp_path):
    source, found = write_shards("tar", tmp_path / "data"), {}
    (tmp_path / "two.py").write_text(TWO)
    for number, size in ((1, 4), (2, 2)):
        (folder := tmp_path / str(number)).mkdir()
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(number), "--standalone"]
        done = subprocess.run(
            [*command, tmp_path / "two.py", base, source, folder, str(size)],
            capture_output=True,
            text=True,
            timeout=300,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        assert done.returncode == 0, done.stderr[-3000:]
        found[number] = [eval(Path(folder, f"{index}.txt").read_text()) for index in range(number)]
    (one,), (left, right) = found[1], found[2]
    assert [a + b for a, b in zip(left, right, strict=True)] == one
