"""Whose work a card is: a person's, or nobody's (rendered by us, or made by a library).

A library's card is nobody's only while every line is one that its template writes, and every key of its metadata too.
Whatever a person adds or fills in makes it theirs.
"""

import re
from dataclasses import dataclass
from functools import cache

from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.repocard import REGEX_YAML_BLOCK

from modeling_vlmoe.model_cards.licences import read_metadata

from .companions import HOST_CARD, is_rendered

# What any of the libraries may add to another's card.
ADDED_LINES = (
    r"#{2,} Framework versions",
    r"- (PEFT|TRL|Transformers|Pytorch|Datasets|Tokenizers):? \S+",
    r"#{2,} Training procedure",
    r"The following `bitsandbytes` quantization config was used during training:",
    r"- (quant_method|_?load_in_\dbit|llm_int8_\w+|bnb_4bit_\w+): .*",
    r"\[<img src=.*",
)
ADDED_KEYS = frozenset({"base_model", "library_name", "pipeline_tag", "tags"})


@dataclass(frozen=True)
class LibraryCard:
    """How a library's card is known.

    Attributes:
        mark: a sentence that each has.
        lines: patterns of the lines that its template writes.
        keys: what its metadata may have, beside `ADDED_KEYS`.
    """

    mark: str
    lines: tuple[str, ...]
    keys: frozenset[str]


LIBRARY_CARDS = (
    # TRL's (1.16), of language and of reward models; its BibTeX blocks are left out before.
    LibraryCard(
        mark="It has been trained using [TRL](https://github.com/huggingface/trl).",
        lines=(
            r"# Model Card for .*",
            r"This model is a fine-tuned version of \[.*\]\(.*\)( on the \[.*\]\(.*\) dataset)?\.",
            r"## (Quick start|Citations)",
            r"```(python)?",
            r"from transformers import pipeline",
            r"(question|text|prompt) = \".*\"",
            r"(generator|rewarder) = pipeline\(.*\)",
            r"output = (generator|rewarder)\(.*\)\[0\]",
            r"print\(output\[\"\w+\"\]\)",
            r"This model was trained with [\w ]+(, a method introduced in \[.*\]\(.*\))?\.",
            r"Cite [\w ]+ as:",
        ),
        keys=frozenset({"datasets", "licence", "model_name"}),
    ),
    # The Trainer's of transformers (5).
    LibraryCard(
        mark="according to the information the Trainer had access to.",
        lines=(
            r"<!-- This model card has been generated automatically according to the information the Trainer had .*",
            r"should probably proofread and complete it, then remove this comment\. -->",
            r"# .*",
            r"This model (was trained from scratch|is a fine-tuned version of \[.*\]\(.*\)) on .* datasets?\.",
            r"It achieves the following results on the evaluation set:",
            r"- [A-Z][\w ./-]*: (-?\d[\d.e+-]*|nan|None)",
            r"## (Model description|Intended uses & limitations|Training and evaluation data)",
            r"### Training (hyperparameters|results)",
            r"More information needed",
            r"The following hyperparameters were used during training:",
            r"- (learning_rate|(total_)?(train|eval)_batch_size|seed|distributed_type|num_devices): .*",
            r"- (gradient_accumulation_steps|optimizer|lr_scheduler_\w+|training_steps|num_epochs): .*",
            r"- (mixed_precision_training|label_smoothing_factor): .*",
            r"\|.*\|",
        ),
        keys=frozenset({"datasets", "language", "license", "metrics", "model-index", "model_name"}),
    ),
)


@cache
def blank_card() -> LibraryCard:
    """The Hub's own template with nothing filled in: PEFT's card, and that of the host's `push_to_hub`."""
    template = ModelCard.from_template(ModelCardData()).text.splitlines()
    # Other releases of the template differ in headings and comments alone.
    lines = [r"# Model Card for .*", r"##+ .*", r"<!--.*-->", rf".*{re.escape(HOST_CARD)}"]
    fixed = {re.escape(line.strip()) for line in template if line.strip()}
    return LibraryCard(mark="[More Information Needed]", lines=(*lines, *sorted(fixed)), keys=frozenset())


def is_librarys(text: str) -> bool:
    """Whether a card is as PEFT, TRL, the Trainer or the host's `push_to_hub` writes it."""
    keys = frozenset(read_metadata(text))
    body = REGEX_YAML_BLOCK.sub("", text.removeprefix("\ufeff").replace("\r\n", "\n"), count=1)
    body = re.sub(r"```bibtex\n.*?```", "", body, flags=re.DOTALL)
    lines = [line.strip() for line in body.splitlines() if line.strip()]
    for card in (*LIBRARY_CARDS, blank_card()):
        if card.mark in text and keys <= card.keys | ADDED_KEYS:
            known = re.compile("|".join((*card.lines, re.escape(card.mark), *ADDED_LINES)))
            return all(known.fullmatch(line) for line in lines)
    return False


def is_persons(text: str) -> bool:
    """Whether somebody has written or edited a card: it is neither as we render it nor as a library makes it."""
    return bool(text.strip()) and not is_rendered(text) and not is_librarys(text)
