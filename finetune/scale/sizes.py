"""How a model is split over processes by transformers' own FSDP2 and expert parallelism: what is refused, and how it
is asked for.
"""

from collections.abc import Iterator
from typing import Any

from modeling_vlmoe.delta_experts import refuse_delta_config
from modeling_vlmoe.moe_config import PARTS, experts_in

SPLIT_PARTS = tuple(part for part in PARTS if part != "connector")  # its experts are not split, as the host's plans go
START = "torchrun --nproc-per-node {number} -m modeling_vlmoe finetune ..."


def is_split(args: Any) -> bool:
    """Whether a recipe splits the model."""
    return (args.fsdp_size or 1) > 1


def is_in_pieces(args: Any) -> bool:
    """Whether no process holds the whole model: a split one, or one of ZeRO-3's."""
    plugin = getattr(args, "deepspeed_plugin", None)
    return is_split(args) or (plugin is not None and plugin.zero_stage == 3)


def _number_of(name: str, number: int | None) -> Iterator[str]:
    if number is not None and number < 1:
        yield f"{name} is {number}; expected 1 or more."


def _size_faults(args: Any) -> Iterator[str]:
    """What is wrong with the sizes themselves."""
    fsdp, ep, world = args.fsdp_size, args.ep_size, args.world_size
    yield from _number_of("fsdp_size", fsdp)
    yield from _number_of("ep_size", ep)
    if (ep or 1) > 1 and (fsdp or 1) == 1:
        yield f"ep_size is {ep}, but fsdp_size is not given; give fsdp_size={ep} or a multiple of it."
    elif (ep or 1) > 1 and fsdp % ep:
        yield f"ep_size is {ep}, which does not divide fsdp_size {fsdp}; choose one that does."
    if (fsdp or 1) > 1 and fsdp != world:
        several = "es" if world > 1 else ""
        yield (
            f"fsdp_size is {fsdp}, but there {'are' if world > 1 else 'is'} {world} process{several}; start as many: "
            f"{START.format(number=fsdp)}"
        )


def _setting_faults(args: Any) -> Iterator[str]:
    """What cannot be had beside a split model."""
    if not is_split(args):
        return
    strategy = str(getattr(args.save_strategy, "value", args.save_strategy))
    if args.resume_from_checkpoint not in (None, False, "false", "no"):
        yield (
            "fsdp_size splits the model, and transformers cannot resume such a run: leave resume_from_checkpoint out, "
            "or train on one process, by DDP or by ZeRO-3 (vlmoe configs)."
        )
    if strategy != "no" and not args.save_only_model:
        yield (
            "fsdp_size splits the model, and transformers writes no optimizer states of such a run: give "
            "save_only_model=true (checkpoints hold the model, and are not resumed from) or save_strategy=no."
        )
    if args.load_best_model_at_end:
        yield "fsdp_size splits the model, and the best is not loaded into it; leave load_best_model_at_end out."
    if args.fsdp or getattr(args, "deepspeed_plugin", None) is not None:
        yield "fsdp_size is transformers' own FSDP2; leave it out under accelerate's FSDP or DeepSpeed."
    if getattr(args, "quantize_bits", None):
        yield "fsdp_size cannot split packed weights; leave quantize_bits out, or train on one process or by DDP."
    if args.auto_find_batch_size:
        yield "fsdp_size splits the model, which cannot begin anew with other batches; leave auto_find_batch_size out."
    if (args.ep_size or 1) > 1 and args.method == "lora":
        yield (
            "ep_size splits the experts, and PEFT's adapters on them cannot be split along; leave ep_size out "
            "(fsdp_size alone splits the base), or choose method full."
        )


def _model_faults(args: Any, config: Any) -> Iterator[str]:
    """What the model's experts do not allow."""
    ep = args.ep_size or 1
    if ep == 1:
        return
    moes = {part: moe for part in SPLIT_PARTS if (moe := config.moe(part)) is not None}
    if not moes:
        yield f"ep_size is {ep}, but neither the LLM nor the ViT of this model has experts; leave ep_size out."
    refuse_delta_config(config, f"ep_size {ep}", SPLIT_PARTS)
    for part, moe in moes.items():
        numbers = {experts_in(moe, position) for position in range(len(moe.layers or [0]))}
        if odd := sorted(number for number in numbers if number % ep):
            yield (
                f"ep_size is {ep}, which does not divide the {odd[0]} experts of a layer of the {part} tower; choose "
                "one that does."
            )


def check_scale(args: Any, config: Any) -> None:
    """Refuses a split that cannot be made, before any weight is read.

    Args:
        args: a `FinetuneArguments`.
        config: the model's.

    Raises:
        ValueError: saying which size or setting, and what to give.
    """
    for faults in (_size_faults(args), _setting_faults(args), _model_faults(args, config)):
        for fault in faults:
            raise ValueError(f"{fault} (Leave fsdp_size and ep_size out to train a whole model in each process.)")


def splitting(args: Any) -> dict[str, Any]:
    """What `from_pretrained` is told for the model to be split while it is read. An adapter's base is read whole, and
    split once the adapter is on it (see adapted.py).
    """
    if not is_split(args) or args.method == "lora":
        return {}
    from transformers.distributed import DistributedConfig

    return {"distributed_config": DistributedConfig(fsdp_size=args.fsdp_size, ep_size=args.ep_size or 1)}
