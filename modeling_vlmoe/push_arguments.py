"""What `vlmoe push` can be told. No torch here: help reads these fields."""

from dataclasses import dataclass, field
from typing import Any

from modeling_vlmoe.conversion.arguments import from_values, option


@dataclass
class PushArguments:
    """A checkpoint's folder goes to a repository on the Hub."""

    folder: str | None = field(
        default=None, metadata={"help": "The folder of a model or an adapter.", "is_argument": True}
    )
    repo_id: str | None = option("The repository: user/name. It is made where there is none.")
    private: bool = option("Make the repository private; one that is public is refused.", False)
    revision: str | None = option("Branch to push to, made where there is none; not given: main.")
    commit_message: str | None = option("The commit's message; not given: it names the folder's kind.")
    base_model: str | None = option(
        "For an adapter that names a local folder: the Hub id of its model, for the files that are pushed."
    )
    token: str | None = option("Access token; not given: HF_TOKEN, or that of `hf auth login`.")
    dry_run: bool = option("Check, print what would be pushed, push nothing.", False)

    @classmethod
    def from_dict(cls, values: dict[str, Any], origin: str) -> "PushArguments":
        """The arguments from plain values, whose types are checked.

        Raises:
            ValueError: for a key that is no field, or a value of another type; `origin` says where it stands.
        """
        return from_values(cls, values, origin)
