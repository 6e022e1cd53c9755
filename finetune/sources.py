"""Models and data as a result may name them: a Hub id, or a folder's or file's name without the path to it."""

from pathlib import Path


def describe_source(given: str) -> dict[str, str | None]:
    """What a model or data is called, and its Hub id where it is no path."""
    path = Path(given).expanduser()
    if path.exists() or path.is_absolute() or given.startswith("."):
        return {"name": path.resolve().name, "hub_id": None}
    return {"name": given, "hub_id": given}
