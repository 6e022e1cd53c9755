"""Licences: what a card states, and what follows for a model that was made of several.

Equal licences stay. Where they differ the model is under all of them: `other`, with a name that holds each. Where one
is not known, neither is the model's: nothing is guessed.
"""

import re
from collections.abc import Iterable
from typing import Any

import yaml
from huggingface_hub.repocard import REGEX_YAML_BLOCK

Licence = dict[str, str]
FIELDS = ("license", "license_name", "license_link")
UNKNOWN, OTHER = "unknown", "other"
HUB = "https://huggingface.co/"


def read_metadata(card: str) -> dict[str, Any]:
    """The metadata of a card's text; none where it has none that can be read."""
    block = REGEX_YAML_BLOCK.search(card.removeprefix("\ufeff"))
    try:
        values = yaml.safe_load(block[2]) if block else None
    except yaml.YAMLError:
        return {}
    return values if isinstance(values, dict) else {}


def stated_licence(card: str) -> Licence | None:
    """What a card's text says of the licence: `license`, and `license_name` and `license_link` where it has them."""
    metadata = read_metadata(card)
    stated = {name: metadata[name] for name in FIELDS if metadata.get(name)}
    if isinstance(stated.get("license"), list):
        stated["license"] = " and ".join(map(str, stated["license"]))
    if stated.get("license") in (None, UNKNOWN):
        return None
    return {name: str(value) for name, value in stated.items()}


def licence_name(licence: Licence | None) -> str:
    """A licence in one word: its own name where the Hub knows it as `other`."""
    if licence is None:
        return UNKNOWN
    return licence.get("license_name", OTHER) if licence["license"] == OTHER else licence["license"]


def parent_licence(parent: dict[str, Any]) -> Licence | None:
    """The licence of a parent as a receipt describes it: the one it states, else what follows from its own parents."""
    if parent.get("license") is not None:
        return parent["license"]
    grandparents = list((parent.get("parents") or {}).values())
    combined = combine_licences(grandparents)
    return None if combined["license"] == UNKNOWN else combined


def combine_licences(parents: Iterable[dict[str, Any]]) -> Licence:
    """The licence of a model made of these parents, as a card's metadata."""
    parents = list(parents)
    found = [(parent, parent_licence(parent)) for parent in parents]
    known = [(parent, licence) for parent, licence in found if licence is not None]
    if not known or len(known) < len(found):
        return {"license": UNKNOWN}
    names = list(dict.fromkeys(licence_name(licence) for _, licence in known))
    if len(names) == 1:
        return dict(known[0][1])
    slug = "-and-".join(re.sub(r"[^a-z0-9.]+", "-", name.lower()).strip("-") for name in names)
    combined = {"license": OTHER, "license_name": slug}
    if link := next(filter(None, (find_link(parent, licence) for parent, licence in known)), None):
        combined["license_link"] = link
    return combined


def stated_otherwise(parents: Iterable[dict[str, Any]]) -> list[tuple[str, Licence, Licence]]:
    """Parents whose card states another licence than follows from what they were made of: name, stated, inherited."""
    found = []
    for parent in parents:
        own = list((parent.get("parents") or {}).values())
        stated, inherited = parent.get("license"), combine_licences(own)
        if own and stated is not None and licence_name(stated) != licence_name(inherited):
            found.append((parent["name"], stated, inherited))
        found += stated_otherwise(own)
    return found


def find_link(parent: dict[str, Any], licence: Licence) -> str | None:
    """Where a parent's licence can be read: its own link, if it can be followed from elsewhere, else its Hub page."""
    link = licence.get("license_link", "")
    if link.startswith(("http://", "https://")):
        return link
    return f"{HUB}{parent['hub_id']}" if parent.get("hub_id") else None
