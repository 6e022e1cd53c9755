"""The stages of a chain: what each begins with, what it is told, and where its result is."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from modeling_vlmoe.conversion.arguments import UpcycleArguments

from ..arguments import FinetuneArguments, parse_settings

STAGES, UPCYCLE, CONTROL = "stages", "upcycle", "control"
MERGED = "merged"
# Of `vlmoe upcycle`'s settings, those that say what a first stage is made of; they may stand at the top.
PARENTS = ("text_model", "vision_model", "vlm_model", "text_revision", "vision_revision", "vlm_revision")


@dataclass(frozen=True)
class Stage:
    """One stage of a chain.

    Attributes:
        number: its place, from 1.
        name: as the recipe has it.
        upcycle: the settings of `vlmoe upcycle`; None for a stage that trains.
        settings: those of a stage that trains, without model and folder.
        control: what differs where the dense control takes this stage.
        output_dir: the chain's folder.
        is_handed_on: whether another stage begins with its result.
    """

    number: int
    name: str
    upcycle: dict[str, Any] | None
    settings: dict[str, Any]
    control: dict[str, Any]
    output_dir: Path
    is_handed_on: bool

    @property
    def folder(self) -> Path:
        """Where it writes."""
        return self.output_dir / f"{self.number}-{self.name}"

    @property
    def result(self) -> Path:
        """The model that it makes; of a LoRA stage the merged one, where there is one."""
        is_adapter = self.upcycle is None and self.settings.get("method", "lora") == "lora"
        has_merged = self.is_handed_on or self.settings.get("merge") in (True, "true")
        return self.folder / MERGED if is_adapter and has_merged else self.folder


@dataclass(frozen=True)
class Chain:
    """A recipe of stages.

    Attributes:
        origin: what messages call it.
        output_dir: its folder.
        start: what the first stage begins with: `model`, or some of `PARENTS`.
        stages: in order.
        force: whether stages that were finished with other settings are run again.
        values: what it was made of, to make another one.
        reads: paths of what is read beside its inputs, by name: the recipe.
        seen_from: the number of the first stage whose batches a control is compared by; None: there is no control.
        is_begun_only: whether stages follow that are not known yet; what is recorded of them is left as it is.
    """

    origin: str
    output_dir: Path
    start: dict[str, Any]
    stages: tuple[Stage, ...]
    force: bool = False
    values: dict[str, Any] = field(default_factory=dict)
    reads: dict[str, str] = field(default_factory=dict)
    seen_from: int | None = None
    is_begun_only: bool = False

    @property
    def result(self) -> Path:
        """The last stage's."""
        return self.stages[-1].result

    def model_of(self, stage: Stage) -> str | None:
        """The model that a stage begins with; None where parents make one."""
        if stage.number > 1:
            return str(self.stages[stage.number - 2].result)
        return self.start.get("model") or self.start.get("vlm_model")

    def arguments(self, stage: Stage, **more: Any) -> FinetuneArguments:
        """The arguments of a stage that trains.

        Raises:
            ValueError: naming the stage and what is wrong in it.
        """
        values = {**stage.settings, "model": self.model_of(stage), "output_dir": str(stage.folder), **more}
        if stage.number == 1:
            values["model_revision"] = self.start.get("model_revision")
        if stage.result != stage.folder:
            values["merge"] = True
        args = parse_settings(values, f"Stage {stage.name} of {self.origin}")
        args.stage_prefix = f"{stage.name}." if len(self.values.get(STAGES, ())) > 1 else ""
        return args

    def upcycling(self, stage: Stage) -> UpcycleArguments:
        """The arguments of a stage that converts.

        Raises:
            ValueError: naming the stage and what is wrong in it.
        """
        assert stage.upcycle is not None
        start: dict[str, Any] = {"vlm_model": self.model_of(stage)}
        if stage.number == 1:
            start = {name: self.start[name] for name in PARENTS if self.start.get(name)}
            if self.start.get("model"):
                start = {"vlm_model": self.start["model"], "vlm_revision": self.start.get("model_revision")}
        values = {**stage.upcycle, **start, "output_dir": str(stage.folder)}
        return UpcycleArguments.from_dict(values, f"Stage {stage.name} of {self.origin}")
