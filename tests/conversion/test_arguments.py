import pytest

from modeling_vlmoe.conversion.arguments import UpcycleArguments, parse_layers
from modeling_vlmoe.conversion.part_arguments import read_fields
from modeling_vlmoe.conversion.planning import asked_experts, fit_layers
from modeling_vlmoe.recipe_files import read_recipe


@pytest.mark.parametrize(
    ("given", "layers"),
    [(None, None), ("0", [0]), ("0,2,5", [0, 2, 5]), ("1-3, 7", [1, 2, 3, 7]), ([1, 4], [1, 4]), (2, [2])],
)
def test_layers_are_read(given, layers):
    assert parse_layers(given, "text_layers") == layers


@pytest.mark.parametrize(("word", "layers"), [("even", [0, 2, 4]), ("odd", [1, 3])])
def test_every_second_layer_is_one_that_the_llm_has(word, layers):
    args = UpcycleArguments(text_experts=4, text_layers=word)
    asked = asked_experts(args)
    fit_layers(args, asked, 5)
    assert asked["text"]["layers"] == layers
    with pytest.raises(ValueError, match=r"vision_layers is .*expected layers counted from 0"):
        UpcycleArguments(vision_layers=word)


@pytest.mark.parametrize("given", ["", "a", "-1", "1,,2", "3-", "5-2", "²", "0-400000000", "9" * 5000])
def test_raises_when_layers_cannot_be_read(given):
    with pytest.raises(ValueError, match=r"text_layers is .*expected layers counted from 0"):
        UpcycleArguments(text_layers=given)


@pytest.mark.parametrize(
    "given",
    [
        "router_logit_norm: 1, norm_topk_prob: false",
        "{router_logit_norm: 1, norm_topk_prob: no}",
        {"router_logit_norm": 1, "norm_topk_prob": False},
    ],
)
def test_any_field_of_a_part_can_be_given(given):
    assert read_fields(given, "text_moe") == {"router_logit_norm": 1, "norm_topk_prob": False}
    args = UpcycleArguments.from_dict({"text_moe": given, "text_experts": 4, "text_router": "sigmoid"}, "r.yaml")
    assert asked_experts(args) == {
        "text": {"num_experts": 4, "router_type": "sigmoid", "router_logit_norm": 1, "norm_topk_prob": False}
    }


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("router_logit_norm", "expected fields of a MoEConfig"),
        ("a: [", "cannot be read"),
        ("num_experts: 4", "give --text-experts"),
        ("router_type: sigmoid", "give --text-router"),
        ({"num_shared_experts": 1}, "made of the whole dense MLP"),
    ],
)
def test_raises_when_fields_of_a_part_cannot_be_read(given, message):
    with pytest.raises(ValueError, match=message):
        UpcycleArguments(text_moe=given)


@pytest.mark.parametrize(
    ("options", "flag"), [({"vision_router": "sigmoid"}, "--vision-router"), ({"vision_moe": "a: 1"}, "--vision-moe")]
)
def test_raises_when_an_option_is_of_a_part_that_stays_dense(options, flag):
    with pytest.raises(ValueError, match=f"{flag} is given, but this part stays dense; give --vision-experts too"):
        asked_experts(UpcycleArguments(text_experts=2, **options))


@pytest.mark.parametrize(
    ("given", "numbers"), [(4, 4), ("4", 4), ("2,4", [2, 4]), ([2, 4], [2, 4]), ([2], [2]), (None, None)]
)
def test_numbers_of_experts_of_a_vit_are_read(given, numbers):
    assert UpcycleArguments.from_dict({"vision_experts": given}, "r.yaml").vision_experts == numbers


@pytest.mark.parametrize("given", ["", "a", "2,", "-1", []])
def test_raises_when_numbers_of_experts_cannot_be_read(given):
    with pytest.raises(ValueError, match=r"vision_experts is .*expected one number"):
        UpcycleArguments(vision_experts=given)


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
        ({"vision_experts": True}, "int or str"),
        ({"text_moe": 3}, "str"),
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
