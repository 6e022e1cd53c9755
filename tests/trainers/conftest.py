"""A tiny vlmoe model with all three parts sparse, on disk."""

import pytest
from transformers import AutoModelForImageTextToText, AutoProcessor

from tests import models


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    processor = models.processor()
    models.sparse_model(image_token_id=processor.image_token_id).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture
def model(base):
    return AutoModelForImageTextToText.from_pretrained(base)


@pytest.fixture
def processor(base):
    return AutoProcessor.from_pretrained(base)
