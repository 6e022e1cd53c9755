"""A saved model with a processor and nothing else, to be given receipts, histories and evaluations."""

import shutil
from pathlib import Path

import pytest

from tests import models


@pytest.fixture(scope="session")
def saved(tmp_path_factory):
    """To be read only."""
    folder = tmp_path_factory.mktemp("saved") / "model"
    processor = models.processor()
    models.sparse_model(image_token_id=processor.image_token_id).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    """A copy, to be changed."""
    return Path(shutil.copytree(saved, tmp_path / "model"))
