"""The licence of a model follows from its parents', and is unknown where one of them is."""

import pytest

from modeling_vlmoe.model_cards.licences import combine_licences, licence_name, parent_licence, stated_licence
from tests.hub_server import metadata_errors
from tests.model_cards.folders import licence, parent

TERMS = licence("other", license_name="my-terms", license_link="https://x.y/terms")


def test_equal_licences_stay():
    assert combine_licences([parent("a/a", licence("mit")), parent("b/b", licence("mit"))]) == {"license": "mit"}
    assert combine_licences([parent("a/a", TERMS), parent("b/b", TERMS)]) == TERMS


@pytest.mark.parametrize(
    ("first", "second", "name", "link"),
    [
        (licence("llama3.1"), licence("apache-2.0"), "llama3.1-and-apache-2.0", "https://huggingface.co/a/a"),
        (licence("apache-2.0"), TERMS, "apache-2.0-and-my-terms", "https://huggingface.co/a/a"),
        (TERMS, licence("mit"), "my-terms-and-mit", "https://x.y/terms"),
        (licence("other", license_link="LICENSE"), licence("mit"), "other-and-mit", "https://huggingface.co/a/a"),
    ],
)
def test_licences_that_differ_are_all_named(first, second, name, link):
    combined = combine_licences([parent("a/a", first), parent("b/b", second)])
    assert combined == {"license": "other", "license_name": name, "license_link": link}
    lines = "\n".join(f"{key}: {value}" for key, value in combined.items())
    assert metadata_errors(f"---\n{lines}\n---\n") == []


def test_local_parents_that_differ_have_no_link_to_show():
    parents = [parent("a", licence("mit"), hub=False), parent("b", licence("apache-2.0"), hub=False)]
    assert combine_licences(parents) == {"license": "other", "license_name": "mit-and-apache-2.0"}


@pytest.mark.parametrize("licences", [(None, None), (None, licence("mit")), (licence("mit"), None), ()])
def test_one_unknown_licence_makes_it_unknown(licences):
    assert combine_licences([parent("a/a", one) for one in licences]) == {"license": "unknown"}


def test_a_model_without_a_licence_has_that_of_its_own_parents():
    own = {"text": parent("a/a", licence("mit")), "vision": parent("b/b", licence("mit"))}
    assert combine_licences([parent("tuned", hub=False, parents=own)]) == {"license": "mit"}
    assert parent_licence(parent("tuned", licence("apache-2.0"), parents=own)) == {"license": "apache-2.0"}
    half = own | {"vision": parent("b/b")}
    assert combine_licences([parent("tuned", hub=False, parents=half)]) == {"license": "unknown"}


@pytest.mark.parametrize(
    ("card", "stated"),
    [
        ("---\nlicense: mit\n---\n# A", {"license": "mit"}),
        ("\ufeff---\r\nlicense: mit\r\n---\r\n", {"license": "mit"}),
        ("---\nlicense: [mit, apache-2.0]\n---\n", {"license": "mit and apache-2.0"}),
        ("---\nlicense: unknown\n---\n", None),
        ("---\ntags: [a]\n---\n", None),
        ("---\nlicense: [\n---\n", None),
        ("---\n- a\n---\n", None),
        ("# no metadata: license: mit", None),
        ("", None),
    ],
)
def test_only_a_stated_licence_is_read(card, stated):
    assert stated_licence(card) == stated


def test_a_licence_of_no_name_is_other():
    assert [licence_name(one) for one in (None, licence("other"), licence("mit"))] == ["unknown", "other", "mit"]
