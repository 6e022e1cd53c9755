"""A parent's licence, as its own card states it when the parent is converted; what no card states is None."""

from pathlib import Path

from transformers.utils import cached_file

from modeling_vlmoe.companions import CARD_NAME
from modeling_vlmoe.model_cards.licences import Licence, stated_licence

from .parents import Parent, is_on_hub


def read_licence(parent: Parent) -> Licence | None:
    """The licence in the parent's card: that in its folder, or on the Hub at the revision that is converted (offline:
    in the cache).
    """
    found = cached_file(
        parent.given if is_on_hub(parent) else str(parent.folder),
        CARD_NAME,
        revision=parent.revision,
        _raise_exceptions_for_gated_repo=False,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    return None if found is None else stated_licence(Path(found).read_text(encoding="utf-8", errors="replace"))
