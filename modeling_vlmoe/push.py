"""`vlmoe push`: a folder's model or adapter, with processor, code, receipt and card, becomes a commit on the Hub.

What others have added to the repository stays, a card that somebody has edited there too. Removed, in the same commit,
is what an earlier push left and this one has not: weights and chat templates that would be loaded beside or instead of
the new ones, and records (receipt, history, evaluation, notes) of another model. The folder is only read.
"""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx2
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants
from huggingface_hub.errors import (
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from transformers.utils import ADAPTER_CONFIG_NAME, CONFIG_NAME

from modeling_vlmoe.model_cards.card import render_facts
from modeling_vlmoe.model_cards.facts import read_facts

from .companions import CARD_NAME
from .push_arguments import PushArguments
from .push_cards import is_persons
from .push_checks import (
    RECORD_FILES,
    TEMPLATE_FILES,
    TEMPLATES,
    Pushed,
    check_card,
    check_folder,
    check_hub_id,
    refuse_local_base,
)

SHARD = r"(-\d{5}-of-\d{5})?"
MODEL_WEIGHTS = re.compile(
    rf"model{SHARD}\.safetensors|pytorch_model{SHARD}\.bin|(model\.safetensors|pytorch_model\.bin)\.index\.json"
)
ADAPTER_WEIGHTS = re.compile(r"adapter_model\.(safetensors|bin)")
ADVICE = {
    400: "The Hub refuses it; mend what it names.",
    401: "Log in by `hf auth login`, set HF_TOKEN, or give --token.",
    403: "Check that the repository is yours, and that the token may write.",
    404: "Check the id, and that the token may see the repository.",
}


@contextmanager
def hub_errors(repo_id: str) -> Iterator[None]:
    """Turns what the Hub answers, or does not, into one line."""
    try:
        yield
    except OfflineModeIsEnabled as error:
        raise ValueError("HF_HUB_OFFLINE keeps this process from the Hub; unset it to push.") from error
    except HfHubHTTPError as error:
        status = error.response.status_code
        said = error.server_message or str(error).strip().splitlines()[0]
        if status in ADVICE:
            raise ValueError(
                f"The Hub refuses the push to {repo_id} ({status}: {said}). Mend that and try again. {ADVICE[status]}"
            ) from error
        raise ConnectionError(f"The push to {repo_id} failed ({status}: {said}). Try again later.") from error
    except httpx2.HTTPError as error:
        raise ConnectionError(f"The Hub at {constants.ENDPOINT} cannot be reached: {error}") from error


def local_card(pushed: Pushed, repo_id: str) -> tuple[str, bool]:
    """The card to push, and whether a person has written it; any other is rendered, with the repository's id.

    Raises:
        ValueError: when a person's card has metadata that the Hub refuses.
    """
    path = pushed.folder / CARD_NAME
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    if is_persons(text):
        check_card(text, path)
        return text, True
    return render_facts(replace(read_facts(pushed.folder), adapter=pushed.adapter_config), repo_id), False


def is_edited_there(api: HfApi, repo_id: str, revision: str, there: list[str]) -> bool:
    """Whether the repository has a card that somebody has written or edited.

    Raises:
        ConnectionError: when it has one that cannot be read: it might be somebody's.
    """
    if CARD_NAME not in there:
        return False
    try:
        file = api.hf_hub_download(repo_id, CARD_NAME, revision=revision)
    except LocalEntryNotFoundError as error:
        raise ConnectionError(f"{CARD_NAME} of {repo_id} cannot be read: {error}. Try again later.") from error
    return is_persons(Path(file).read_text(encoding="utf-8", errors="replace"))


def check_base(api: HfApi, pushed: Pushed, base_model: str | None) -> None:
    """Asks the Hub for the model that an adapter belongs to: `out/base` may be a repository, or a folder elsewhere.

    Raises:
        ValueError: when there is none that the token may see.
    """
    if pushed.adapter_config is None:
        return
    base = pushed.adapter_config["base_model_name_or_path"]
    if api.repo_exists(base):
        return
    if base_model is None:
        raise refuse_local_base(pushed.folder, f"{base} (which the Hub does not have, or does not show to this token)")
    raise ValueError(
        f"--base-model {base}: the Hub has no such model, or does not show it to this token. Push it first (vlmoe "
        "push), or give another id."
    )


def list_there(api: HfApi, repo_id: str, revision: str) -> list[str]:
    """What the branch holds, or will hold once it is made: a new one starts as main, a new repository empty."""
    try:
        info = api.model_info(repo_id, revision=revision)
    except RevisionNotFoundError:
        info = api.model_info(repo_id)
    except RepositoryNotFoundError:
        return []
    return [one.rfilename for one in info.siblings or []]


def check_kind(pushed: Pushed, there: list[str], repo_id: str) -> None:
    """Refuses an adapter where a whole model is, and the reverse: a repository is loaded as the one or the other.

    Raises:
        ValueError: naming the files.
    """
    if pushed.is_adapter:
        others = [name for name in there if name == CONFIG_NAME or MODEL_WEIGHTS.fullmatch(name)]
    else:
        others = [name for name in there if name == ADAPTER_CONFIG_NAME or ADAPTER_WEIGHTS.fullmatch(name)]
    if others:
        ours, theirs = ("an adapter", "a whole model") if pushed.is_adapter else ("a whole model", "an adapter")
        raise ValueError(
            f"{repo_id} holds {theirs} ({', '.join(others)}), but {pushed.folder} holds {ours}; one repository is "
            "loaded as the one or the other. Give another --repo-id, or delete those files there first."
        )


def open_repository(api: HfApi, repo_id: str, revision: str, is_private: bool) -> None:
    """Makes the repository and the branch where they are not there.

    Raises:
        ValueError: when it was to be private, and is public.
    """
    api.create_repo(repo_id, private=is_private or None, exist_ok=True)
    if is_private and not api.model_info(repo_id).private:
        raise ValueError(f"--private is given, but {repo_id} is there already and public. Make it private first.")
    if revision != constants.DEFAULT_REVISION:
        api.create_branch(repo_id, branch=revision, exist_ok=True)


def find_stale(pushed: Pushed, there: list[str]) -> list[str]:
    """What an earlier push left in the repository that is not of what is pushed."""
    named = {*RECORD_FILES, *TEMPLATE_FILES}
    patterns = (MODEL_WEIGHTS, ADAPTER_WEIGHTS, TEMPLATES)
    ours = [name for name in there if name in named or any(pattern.fullmatch(name) for pattern in patterns)]
    return [name for name in ours if name not in pushed.files]


def build_operations(pushed: Pushed, card: str | None, stale: list[str]) -> list[Any]:
    """The commit: the files, the card, and the removal of what an earlier push left."""
    operations: list[Any] = [
        CommitOperationAdd(path_in_repo=name, path_or_fileobj=pushed.replaced.get(name, pushed.folder / name))
        for name in pushed.files
    ]
    if card is not None:
        operations.append(CommitOperationAdd(path_in_repo=CARD_NAME, path_or_fileobj=card.encode()))
    return operations + [CommitOperationDelete(name) for name in stale]


def push(args: PushArguments) -> str:
    """Pushes a folder.

    Args:
        args: what, and where to.

    Returns:
        What was done, for people; in a dry run what would be.

    Raises:
        ValueError: for whatever the user can mend: before anything is sent, where it can be known.
        ConnectionError: when the Hub cannot be reached, or fails.
    """
    if args.folder is None or args.repo_id is None:
        raise ValueError("Give the folder to push, and --repo-id user/name.")
    check_hub_id(args.repo_id, "--repo-id")
    pushed = check_folder(args.folder, args.base_model)
    card, is_edited = local_card(pushed, args.repo_id)
    if args.dry_run:
        base = (pushed.adapter_config or {}).get("base_model_name_or_path")
        unasked = f"\nnot asked in a dry run: whether the Hub has {base}" if base else ""
        return describe(pushed, f"would go to {args.repo_id}", CARD_NAME) + unasked
    revision = args.revision or constants.DEFAULT_REVISION
    api = HfApi(token=args.token, library_name="vlmoe")
    with hub_errors(args.repo_id):
        check_base(api, pushed, args.base_model)
        there = list_there(api, args.repo_id, revision)
        check_kind(pushed, there, args.repo_id)
        open_repository(api, args.repo_id, revision, args.private)
        keeps_theirs = not is_edited and is_edited_there(api, args.repo_id, revision, there)
        stale = find_stale(pushed, there)
        done = api.create_commit(
            args.repo_id,
            build_operations(pushed, None if keeps_theirs else card, stale),
            commit_message=args.commit_message or f"Upload {'adapter' if pushed.is_adapter else 'model'} with vlmoe",
            revision=revision,
        )
    kept = f"{CARD_NAME}: that of the repository has been edited, and stays" if keeps_theirs else CARD_NAME
    return describe(pushed, f"went to {done.commit_url}", kept, stale)


def describe(pushed: Pushed, where: str, card: str, stale: Sequence[str] = ()) -> str:
    """What is pushed, what is not, and what was removed there, a line each."""
    lengths = {name: len(content) for name, content in pushed.replaced.items()}
    sizes = [f"  {lengths.get(name) or (pushed.folder / name).stat().st_size:>14,}  {name}" for name in pushed.files]
    lines = [f"{pushed.folder} {where}:", *sizes, f"  {'':>14}  {card}"]
    lines += [f"left out: {', '.join(pushed.left_out)}"] if pushed.left_out else []
    lines += [f"removed there, of an earlier push: {', '.join(stale)}"] if stale else []
    return "\n".join(lines)
