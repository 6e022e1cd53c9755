"""Processors of tiny parents."""

import pytest

from modeling_vlmoe.processing_vlmoe import VLMoEProcessor
from tests import tiny
from tests.modeling_vlmoe.pictures_and_chats import NUM_IMAGE_TOKENS


@pytest.fixture(params=tiny.VISION_FAMILIES)
def processor(request) -> VLMoEProcessor:
    return VLMoEProcessor.from_parents(tiny.image_processor(request.param), tiny.tokenizer(), NUM_IMAGE_TOKENS)


@pytest.fixture
def clip_processor() -> VLMoEProcessor:
    return VLMoEProcessor.from_parents(tiny.image_processor("clip"), tiny.tokenizer(), NUM_IMAGE_TOKENS)
