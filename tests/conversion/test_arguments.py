import pytest

from modeling_vlmoe.conversion.arguments import UpcycleArguments, parse_layers
from modeling_vlmoe.recipe_files import read_recipe


@pytest.mark.parametrize(
    ("given", "layers"),
    [(None, None), ("0", [0]), ("0,2,5", [0, 2, 5]), ("1-3, 7", [1, 2, 3, 7]), ([1, 4], [1, 4]), (2, [2])],
)
def test_layers_are_read(given, layers):
    assert parse_layers(given, "text_layers") == layers


@pytest.mark.parametrize("given", ["", "a", "-1", "1,,2", "3-", "5-2", "²", "0-400000000", "9" * 5000])
def test_raises_when_layers_cannot_be_read(given):
    with pytest.raises(ValueError, match=r"text_layers is .*expected layers counted from 0"):
        UpcycleArguments(text_layers=given)


def test_raises_when_a_key_is_unknown():
    with pytest.raises(ValueError, match=r"r.yaml has unknown keys: num_experts, tekst_model. Known: text_model"):
        UpcycleArguments.from_dict({"tekst_model": "x", "num_experts": 3}, "r.yaml")


@pytest.mark.parametrize("layer", [-2, [-2, -1], None])
def test_feature_layers_are_read(layer):
    values = {"vision_feature_layer": layer}
    assert UpcycleArguments.from_dict(values, "r.yaml").vision_feature_layer == layer


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"seed": "0"}, "int"),
        ({"force": 1}, "yes or no"),
        ({"text_model": 3}, "str"),
        ({"text_experts": True}, "int"),
        ({"vision_feature_layer": [-2, "a"]}, "int"),
        ({"seed": None}, "int"),
    ],
)
def test_raises_when_a_value_has_another_type(values, expected):
    with pytest.raises(ValueError, match=rf"r.yaml: {next(iter(values))} is .*expected {expected}"):
        UpcycleArguments.from_dict(values, "r.yaml")


def test_a_recipe_is_read(tmp_path):
    (tmp_path / "r.yaml").write_text("text_model: a/b\ntext_layers: [0, 1]\nseed: 3\n")
    args = UpcycleArguments.from_dict(read_recipe(tmp_path / "r.yaml"), "r.yaml")
    assert (args.text_model, args.text_layers, args.seed, args.expert_init) == ("a/b", [0, 1], 3, "copy")


def test_raises_when_there_is_no_recipe(tmp_path):
    with pytest.raises(ValueError, match=r"There is no recipe"):
        read_recipe(tmp_path / "r.yaml")


@pytest.mark.parametrize(
    ("text", "message"), [("a: [", "not valid YAML"), ("- a", "not a mapping"), ("", "not a mapping")]
)
def test_raises_when_a_recipe_cannot_be_read(tmp_path, text, message):
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_recipe(tmp_path / "r.yaml")
