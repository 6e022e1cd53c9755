"""Models and data as a result may name them: a Hub id, or a folder's or file's name without the path to it."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def describe_source(given: str) -> dict[str, str | None]:
    """What a model or data is called, and its Hub id where it is no path."""
    path = Path(given).expanduser()
    if path.exists() or path.is_absolute() or given.startswith("."):
        return {"name": path.resolve().name, "hub_id": None}
    return {"name": given, "hub_id": given}


def describe_sources(given: str | Sequence[str]) -> dict[str, Any]:
    """What one source or several are called; of several also each by itself."""
    if isinstance(given, str):
        return describe_source(given)
    known = [describe_source(one) for one in given]
    return {"name": joined_names(known), "hub_id": None, "sources": known}


def joined_names(known: Sequence[Mapping[str, Any]]) -> str:
    """The names of several sources as one."""
    return " + ".join(str(one["name"]) for one in known)


def source_names(sources: Sequence[str]) -> list[str]:
    """What each of several sources is called: names that are given twice are counted."""
    found: list[str] = []
    names: list[str] = []
    for source in sources:
        name = str(describe_source(source)["name"])
        names.append(name)
        found.append(f"{name} ({names.count(name)})" if names.count(name) > 1 else name)
    return found
