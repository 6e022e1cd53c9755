"""What docs/data.md shows is read as it says."""

import json
import re
from pathlib import Path

import pytest
import yaml

from modeling_vlmoe.finetune import load_chat_data
from modeling_vlmoe.finetune.data_formats.names import LOOKS
from modeling_vlmoe.finetune.data_formats.reading import Reading, columns_of, file_reader
from modeling_vlmoe.finetune.settings import FinetuneSettings
from tests.finetune.data import forms

PAGE = (Path(__file__).parents[3] / "docs" / "data.md").read_text(encoding="utf-8")
ROWS = dict(re.findall(r"^### (\w+)\n.*?^```json\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL))


@pytest.mark.parametrize("form", LOOKS)
def test_each_form_has_an_example_that_is_of_it(form, tmp_path):
    row = json.loads(ROWS[form])
    path = forms.write("jsonl", tmp_path, [row])
    (tmp_path / "images").mkdir()
    for number, name in enumerate(forms.COLOURS):
        (tmp_path / f"{name}.png").rename(tmp_path / "images" / f"{number}.png")
    assert file_reader((str(path),), Reading(), columns_of((str(path),))).form == form
    assert load_chat_data(path)[0]["messages"][-1]["role"] == "assistant"


def test_the_mixture_is_of_settings_that_there_are():
    (block,) = re.findall(r"^```yaml\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    settings = yaml.safe_load(block)
    assert all(hasattr(FinetuneSettings(), name) for name in settings)
    assert len(settings["data"]) == len(settings["data_weights"])
