"""A control is judged on all the data that its recipe names."""

import shutil

from modeling_vlmoe.finetune.arguments import parse_settings
from modeling_vlmoe.finetune.control.judging import columns, judge_likelihoods, judge_task


def test_the_split_of_several_data_is_judged(controlled, pictures, tmp_path):
    folders = [shutil.copytree(pictures, tmp_path / name) for name in "ab"]
    settings = {"model": "m", "data": list(map(str, folders)), "eval_split": "test", "output_dir": "out"}
    args = parse_settings(settings | {"use_cpu": True, "report_to": "none"}, "Recipe mine")
    found = columns([controlled[0] / "3-moe-tune"], [controlled[0] / "control/dense-42/1-moe-tune"])
    likelihoods, _ = judge_likelihoods(found, args)
    measures, _ = judge_task(found, args, "vqa", tmp_path / "evaluation", lambda said: None)
    assert likelihoods.measures[0].as_dict()["n"] == 8
    assert {one["n"] for one in measures.values()} == {8}
