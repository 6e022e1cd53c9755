"""`vlmoe push`: a folder's model or adapter, with processor, code, receipt and card, becomes a commit on the Hub.

What others have added to the repository stays, a card that somebody has edited there too. Only weights of an earlier
push that the new ones replace are removed, because the host would load them instead.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, OfflineModeIsEnabled

from modeling_vlmoe.model_cards import is_rendered, render_card

from .companions import CARD_NAME, HOST_CARD
from .push_arguments import PushArguments
from .push_checks import Pushed, check_card, check_folder, check_hub_id

WEIGHTS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json")
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


def local_card(folder: Path, repo_id: str) -> tuple[str, bool]:
    """The card to push, and whether a person has written it; any other is rendered, with the repository's id.

    Raises:
        ValueError: when a person's card has metadata that the Hub refuses.
    """
    path = folder / CARD_NAME
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    if text and not is_rendered(text):
        check_card(text, path)
        return text, True
    return render_card(folder, repo_id=repo_id), False


def is_edited_there(api: HfApi, repo_id: str, revision: str) -> bool:
    """Whether the repository has a card that somebody has written or edited."""
    try:
        file = api.hf_hub_download(repo_id, CARD_NAME, revision=revision)
    except EntryNotFoundError:
        return False
    text = Path(file).read_text(encoding="utf-8", errors="replace")
    return not is_rendered(text) and HOST_CARD not in text


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


def build_operations(pushed: Pushed, card: str | None, there: list[str]) -> list[Any]:
    """The commit: the files, the card, and the removal of weights that would be loaded instead of the new ones."""
    operations: list[Any] = [
        CommitOperationAdd(path_in_repo=name, path_or_fileobj=pushed.folder / name) for name in pushed.files
    ]
    if card is not None:
        operations.append(CommitOperationAdd(path_in_repo=CARD_NAME, path_or_fileobj=card.encode()))
    stale = [] if pushed.is_adapter else [name for name in there if WEIGHTS.fullmatch(name)]
    return operations + [CommitOperationDelete(name) for name in stale if name not in pushed.files]


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
    pushed = check_folder(args.folder, args.base_model, args.dry_run)
    card, is_edited = local_card(pushed.folder, args.repo_id)
    if args.dry_run:
        return describe(pushed, f"would go to {args.repo_id}", CARD_NAME)
    revision = args.revision or constants.DEFAULT_REVISION
    api = HfApi(token=args.token, library_name="vlmoe")
    with hub_errors(args.repo_id):
        open_repository(api, args.repo_id, revision, args.private)
        keeps_theirs = not is_edited and is_edited_there(api, args.repo_id, revision)
        there = api.list_repo_files(args.repo_id, revision=revision)
        done = api.create_commit(
            args.repo_id,
            build_operations(pushed, None if keeps_theirs else card, there),
            commit_message=args.commit_message or f"Upload {'adapter' if pushed.is_adapter else 'model'} with vlmoe",
            revision=revision,
        )
    kept = f"{CARD_NAME}: that of the repository has been edited, and stays" if keeps_theirs else CARD_NAME
    return describe(pushed, f"went to {done.commit_url}", kept)


def describe(pushed: Pushed, where: str, card: str) -> str:
    """What is pushed and what is not, a line each."""
    sizes = [f"  {(pushed.folder / name).stat().st_size:>14,}  {name}" for name in pushed.files]
    left_out = f"\nleft out: {', '.join(pushed.left_out)}" if pushed.left_out else ""
    return "\n".join([f"{pushed.folder} {where}:", *sizes, f"  {'':>14}  {card}"]) + left_out
