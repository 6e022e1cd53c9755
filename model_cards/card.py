"""A folder's README.md: rendered from its files, and left alone once a person has edited it.

The last line of a rendered card is a comment with the hash of all that stands above. While it holds, the card is ours
to render anew. A card without it, or with another text above, was written by somebody else and stays as it is.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import ModelCard

from modeling_vlmoe.companions import CARD_NAME, is_rendered, mark_rendered

from . import sections
from .control_words import describe_control
from .facts import CardFacts, read_facts
from .metadata import build_metadata
from .usages import find_usage

logger = logging.getLogger(__name__)

TEMPLATE = Path(__file__).with_name("template.md")


def render_facts(facts: CardFacts, repo_id: str | None = None) -> str:
    """The card of a folder that has been read."""
    card = ModelCard.from_template(
        build_metadata(facts),
        template_path=str(TEMPLATE),
        title=facts.notes.title or (repo_id or facts.name).rpartition("/")[2],
        repo_id=repo_id,
        name=facts.name,
        what_it_is=sections.what_it_is(facts),
        parents=sections.describe_parents(facts),
        licence=sections.describe_licence(facts),
        upcycling=sections.describe_upcycling(facts),
        training=sections.describe_training(facts),
        evaluation="\n\n".join(filter(None, [sections.describe_evaluation(facts), describe_control(facts)])),
        intended_use=sections.describe_use(facts),
        bias=sections.describe_bias(facts),
        limits=sections.describe_limits(facts),
        **vars(find_usage(facts)),
    )
    return mark_rendered(str(card))


def render_card(folder: str | Path, name: str | None = None, repo_id: str | None = None) -> str:
    """The card of a checkpoint's folder, as text.

    Args:
        folder: a whole model or an adapter, with its receipt, history, evaluation and notes where it has them.
        name: what the model is called, where the folder's name is not it.
        repo_id: the repository that the quick start loads from; not given: the folder, seen from the one above.

    Raises:
        ValueError: when the folder holds no model of ours, or a file that cannot be read.
    """
    facts = read_facts(folder)
    if name is not None:
        facts = CardFacts(**{**vars(facts), "name": name})
    return render_facts(facts, repo_id)


def write_card(folder: str | Path, name: str | None = None, replace: bool = False) -> bool:
    """Renders README.md, unless somebody has edited it.

    Args:
        folder: the checkpoint's.
        name: what the model is called, where the folder's name is not it.
        replace: whether a card that is not as it was rendered is known to be nobody's work (a library's own).

    Returns:
        Whether it was written.
    """
    path = Path(folder) / CARD_NAME
    if path.is_file() and not replace and not is_rendered(path.read_text(encoding="utf-8", errors="replace")):
        logger.warning("%s has been edited, and stays as it is; remove it to have it rendered from the files.", path)
        return False
    path.write_text(render_card(folder, name), encoding="utf-8")
    return True


@contextmanager
def keep_edited_card(folder: str | Path) -> Iterator[None]:
    """Around a library's saving, which writes cards of its own: an edited card is put back, any other is rendered."""
    path = Path(folder) / CARD_NAME
    before = path.read_bytes() if path.is_file() else None
    yield
    if before is not None and not is_rendered(before.decode("utf-8", errors="replace")):
        path.write_bytes(before)
        write_card(folder)  # says that it stays
    else:
        write_card(folder, replace=True)
