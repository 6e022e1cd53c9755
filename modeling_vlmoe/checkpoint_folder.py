"""How our models are loaded and saved beside what the host does: with the texts that travel with the weights, and in
a form that pickles.
"""

from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.dynamic_module_utils import custom_object_save

from .companions import read_companions, replace_host_card, write_companions
from .delta_experts import freeze_bases, refuse_split_deltas
from .expert_precision import warn_of_full_experts
from .part_overrides import check_overrides
from .parts import find_towers
from .recorders import make_recorders_picklable, register_recorders
from .towers import skip_pooling


def compute_buffers(model: nn.Module) -> None:
    """Lets a tower give its layers' buffers their values, where it does so as a whole (Falcon-H1).

    The host leaves that out below code that is not its own, where the tower has no parameter of itself (transformers
    5.23, `_initialize_weights`). What has been loaded stays.
    """
    for module in model.modules():
        if isinstance(module, CheckpointFolder) or not isinstance(module, PreTrainedModel):
            continue
        if not list(module.parameters(recurse=False)):
            type(module)._init_weights(module, module)


class CheckpointFolder:
    """A base of model classes, before the host's.

    Attributes:
        companions: texts that travel with the weights, by file name (see companions.py).
    """

    companions: dict[str, str] = {}

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *model_args: Any, **kwargs: Any) -> Any:
        """As the host does; the receipt, the history and the card are read too.

        Raises:
            ValueError: when `text_moe`, `vision_moe` or `connector_moe` ask for experts that the weights are not.
        """
        if pretrained_model_name_or_path is not None:
            check_overrides(pretrained_model_name_or_path, **kwargs)
        loaded = super().from_pretrained(  # type: ignore[misc]
            pretrained_model_name_or_path, *model_args, **kwargs
        )
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        if pretrained_model_name_or_path is not None:
            model.companions = read_companions(pretrained_model_name_or_path, **kwargs)
        if hasattr(model, "hf_device_map"):
            for _, tower in find_towers(model).values():
                skip_pooling(tower)
        compute_buffers(model)
        warn_of_full_experts(model)
        freeze_bases(model)
        return loaded

    @classmethod
    def maybe_distribute_model(cls, model: Any, distributed_config: Any, *args: Any, **kwargs: Any) -> Any:
        """As the host does, before it loads weights; delta experts are not split.

        Raises:
            ValueError: naming what makes experts of them that are.
        """
        refuse_split_deltas(model, distributed_config)
        return super().maybe_distribute_model(model, distributed_config, *args, **kwargs)  # type: ignore[misc]

    def save_pretrained(self, save_directory: Any, is_main_process: bool = True, *args: Any, **kwargs: Any) -> None:
        """As the host does; the receipt, the history and the card are written too (see companions.py)."""
        super().save_pretrained(save_directory, is_main_process, *args, **kwargs)  # type: ignore[misc]
        if self.should_save_on_this_rank(is_main_process):  # type: ignore[attr-defined]
            write_companions(self.companions, save_directory)
            is_made = self._auto_class is None  # type: ignore[attr-defined]
            if is_made and Path(save_directory).is_dir():  # of a class that is derived: see HOME
                custom_object_save(self, save_directory)

    def _upload_modified_files(self, working_dir: Any, repo_id: str, *args: Any, **kwargs: Any) -> Any:
        # Both of the host's ways to push end here (transformers 5.23).
        write_companions(self.companions, working_dir)
        replace_host_card(self.companions, working_dir, repo_id)
        return super()._upload_modified_files(working_dir, repo_id, *args, **kwargs)  # type: ignore[misc]

    def __getstate__(self) -> dict[str, Any]:
        make_recorders_picklable(self)  # type: ignore[arg-type]
        return self.__dict__

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[misc]
        register_recorders(self)  # type: ignore[arg-type]
