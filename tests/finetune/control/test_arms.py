"""What a control trains is settled and checked before anything is trained."""

import pytest

from modeling_vlmoe.conversion import UpcycleArguments, upcycle
from modeling_vlmoe.finetune.chain.recipe import parse_chain
from modeling_vlmoe.finetune.control.arms import build_pairs
from modeling_vlmoe.finetune.control.settings import ControlSettings
from tests.finetune.chain import chains

EXPERTS = {"text_experts": 4, "text_layers": "0,2"}
TUNE = {"method": "full", "train": ["moe-layers"]}


@pytest.fixture(scope="session")
def dense(parents, tmp_path_factory):
    text, vision = map(str, parents)
    folder = tmp_path_factory.mktemp("made") / "dense"
    return upcycle(UpcycleArguments(text, vision, output_dir=str(folder), dense=True))


@pytest.fixture
def pairs(dense, data, tmp_path):
    """Both chains of a recipe that aligns, upcycles and tunes."""

    def build(align=None, tune=None, seeds=1):
        stages = {"align": {"method": "align"} | (align or {}), "upcycle": {"upcycle": EXPERTS}}
        stages["tune"] = TUNE | (tune or {})
        given = {"model": str(dense), "data": str(data), "eval_data": str(data), "output_dir": str(tmp_path / "out")}
        shared = {name: value for name, value in chains.SHARED.items() if name != "lora_r"}
        chain = parse_chain(shared | given | {"stages": stages}, {}, "Recipe mine")
        return build_pairs(chain, ControlSettings(with_dense_control=True, control_seeds=seeds))

    return build


def seeds_of(chain):
    return [chain.arguments(stage).seed for stage in chain.stages if stage.upcycle is None]


def test_one_seed_leaves_the_stages_theirs(pairs):
    (pair,) = pairs({"seed": 7})
    assert seeds_of(pair.sparse) == [7, 42]
    assert seeds_of(pair.dense) == [42]


def test_several_seeds_are_each_for_all_stages(pairs):
    assert [seeds_of(pair.sparse) for pair in pairs(seeds=[42, 5])] == [[42, 42], [5, 5]]


def test_raises_when_stages_have_seeds_of_their_own_and_several_are_asked_for(pairs):
    with pytest.raises(
        ValueError, match=r"seeds of their own \(align 7, tune 42\), but control_seeds .*Leave seed out"
    ):
        pairs({"seed": 7}, seeds=2)


@pytest.mark.parametrize(
    ("tune", "message"),
    [
        ({"control": {"train": ["mpl"]}}, "Stage tune of the control of Recipe mine: train has 'mpl'.*Did you mean"),
        ({"control": {"learning_rate": "fast"}}, "Stage tune of the control of Recipe mine: learning_rate.*fast"),
        ({"control": {"train": ["experts"]}}, "Stage tune of the control of Recipe mine: .*experts"),
        ({"train": ["experts", "mlp"], "learning_rates": {"experts": 1e-4}}, "0.0001 for experts and none for mlp"),
    ],
)
def test_raises_before_anything_is_trained_when_the_control_could_not_run(pairs, tune, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        pairs(tune=tune)
    assert not (tmp_path / "out").exists()


def test_the_control_says_what_the_two_rates_are(pairs):
    rates = {"train": ["experts", "mlp"], "learning_rates": {"experts": 1e-4}}
    (pair,) = pairs(tune=rates | {"control": {"learning_rates": {"mlp": 1e-3}}})
    assert pair.differs["tune"]["learning_rates"] == {"mlp": 1e-3}
