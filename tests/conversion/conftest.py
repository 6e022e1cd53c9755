"""Dense parents on disk, written once, and a shorthand for upcycling them."""

import contextlib
import shutil
from pathlib import Path

import pytest

from modeling_vlmoe.conversion import UpcycleArguments, upcycle
from tests import hosts, tiny

ALL_SPARSE = {"text_experts": 8, "vision_experts": 4, "connector_experts": 4}


@pytest.fixture(scope="session")
def parents(tmp_path_factory):
    """A folder with one parent of each family, to be read only."""
    root = tmp_path_factory.mktemp("parents")
    for family in tiny.TEXT_FAMILIES:
        tiny.save_text_parent(root / family, family)
    for family in tiny.VISION_FAMILIES:
        tiny.save_vision_parent(root / family, family)
    return root


@pytest.fixture
def copied(parents, tmp_path):
    """Copies a parent, to be damaged."""

    def copy(name: str) -> Path:
        return Path(shutil.copytree(parents / name, tmp_path / "copied" / name))

    return copy


@pytest.fixture
def arguments(parents, tmp_path):
    """The arguments of a Llama + SigLIP upcycling into `tmp_path / "out"`, changed as asked."""

    def make(**changes) -> UpcycleArguments:
        given = {
            "text_model": parents / "llama",
            "vision_model": parents / "siglip",
            "output_dir": tmp_path / "out",
        } | changes
        return UpcycleArguments(
            **{key: str(value) if isinstance(value, Path) else value for key, value in given.items()}
        )

    return make


@pytest.fixture(scope="session")
def upcycled(parents, tmp_path_factory):
    """A Llama + SigLIP checkpoint, all three parts sparse, to be read only."""
    out = tmp_path_factory.mktemp("upcycled") / "model"
    settings = {"text_model": str(parents / "llama"), "vision_model": str(parents / "siglip"), "output_dir": str(out)}
    return upcycle(UpcycleArguments(**settings, **ALL_SPARSE))


@pytest.fixture
def leaves_nothing(tmp_path):
    """Within it `tmp_path / "out"` does not come into being, nor anything beside it."""

    @contextlib.contextmanager
    def check():
        before = sorted(tmp_path.iterdir())
        yield
        assert sorted(tmp_path.iterdir()) == before

    return check


def host_options(family):
    """Every part of a family that can be sparse."""
    asked = {"text_experts": 4, "vision_experts": 3}
    return asked | ({"connector_experts": 4} if hosts.HOSTS[family].has_connector else {})


@pytest.fixture(scope="session")
def upcycled_host(tmp_path_factory):
    """Gives a dense VLM's folder and that of the same VLM sparse in place, each written once, to be read only."""
    root, made = tmp_path_factory.mktemp("hosts"), {}

    def get(family):
        if family not in made:
            dense = hosts.save(root / family / "dense", family)
            given = {"vlm_model": str(dense), "output_dir": str(root / family / "sparse")}
            made[family] = dense, upcycle(UpcycleArguments(**given, **host_options(family)))
        return made[family]

    return get
