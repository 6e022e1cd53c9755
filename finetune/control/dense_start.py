"""The dense model that a control begins with, where the recipe begins with a sparse one.

Its receipt leads there: to the parents that the sparse model was made of, if they are on the Hub and it has not been
trained since. Else the user names it.
"""

from typing import Any

from modeling_vlmoe.companions import RECEIPT_NAME
from modeling_vlmoe.configuration_vlmoe import VLMoEConfig
from modeling_vlmoe.conversion.parents import find_folder
from modeling_vlmoe.model_cards.side_files import read_side_file
from modeling_vlmoe.weight_fingerprint import fingerprint

from ..chain.checks import is_sparse
from ..chain.stages import UPCYCLE
from ..checkpoints import load_base_config
from .settings import ControlSettings

GIVEN = "a model of `vlmoe upcycle --dense` that was trained as far as this one"
# Of a receipt's roles, the settings that name parent and revision.
ROLES = {role: (f"{role}_model", f"{role}_revision") for role in ("text", "vision", "vlm")}
# What of the sparse model's configuration the dense one has to share.
SHARED = ("vision_feature_layer", "vision_feature_select_strategy")


def given_start(model: str) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """What a control begins with, where the user names it: as it is, or made one of ours first.

    Raises:
        ValueError: if it is sparse.
    """
    config = load_base_config(model)
    if config.model_type != VLMoEConfig.model_type:
        return {"vlm_model": model}, {UPCYCLE: {"dense": True}}
    if is_sparse(config):
        raise ValueError(f"dense_model {model} has experts; give the dense model that the sparse one was made of.")
    return {"model": model}, None


def read_parents(model: str, revision: str | None) -> dict[str, Any]:
    """The receipt of a sparse model that is as its upcycling wrote it, all of whose parents are on the Hub.

    Raises:
        ValueError: saying why the control cannot begin there.
    """
    folder = find_folder(model, "model", revision, flag="model")
    receipt = read_side_file(folder, RECEIPT_NAME)
    if not receipt or not (parents := receipt.get("parents")):
        raise ValueError(
            f"model {model} has no {RECEIPT_NAME} that names its dense parents; give dense_model=, {GIVEN}."
        )
    if receipt.get("weights") is None or receipt["weights"] != fingerprint(folder):
        raise ValueError(
            f"model {model} was trained since it was upcycled, and its dense parents were not; give dense_model=, "
            f"{GIVEN}. A recipe of stages trains both from the start."
        )
    if local := [str(parent["name"]) for parent in parents.values() if not parent.get("hub_id")]:
        raise ValueError(
            f"The receipt of model {model} names {', '.join(local)}, not where they are; give dense_model=, {GIVEN}."
        )
    return receipt


def receipt_start(model: str, revision: str | None) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a control begins with, as the sparse model's receipt says: the parents, and how they are put together.

    Raises:
        ValueError: if it does not lead there.
    """
    receipt = read_parents(model, revision)
    start: dict[str, Any] = {}
    for role, parent in receipt["parents"].items():
        named, at = ROLES[role]
        start |= {named: parent["hub_id"], at: parent.get("revision")}
    config = load_base_config(model, revision)
    same = {name: getattr(config, name, None) for name in SHARED} if "vlm" not in receipt["parents"] else {}
    told = {name: value for name, value in same.items() if value is not None}
    made = {"dense": True, "seed": receipt.get("seed", 0), "dtype": (receipt.get("settings") or {}).get("dtype")}
    return start, {UPCYCLE: {name: value for name, value in made.items() if value is not None} | told}


def find_start(
    model: str, revision: str | None, control: ControlSettings
) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """What a control begins with beside a sparse model, and the values of a stage that makes it, where one is needed.

    Raises:
        ValueError: if nothing leads to a dense model.
    """
    if control.dense_model:
        return given_start(control.dense_model)
    return receipt_start(model, revision)
