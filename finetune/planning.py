"""Memory plans for a user: of a recipe that is thought about, of a run that begins, and of one that ran out of it."""

import errno
import gc
import logging
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from modeling_vlmoe.conversion.parents import BROKEN

from .arguments import FinetuneArguments, parse_settings, read_overrides, read_recipe
from .checkpoints import load_processor
from .gpus import CPU, GPU, Device
from .hollow_models import load_any_config
from .memory_plan import RESERVE, MemoryPlan
from .plan_words import NOTHING_LOWER, fit, gigabytes, list_remedies, name_device, one_line, packed, table
from .remedies import estimate_largest, find_remedies, three_remedies
from .scale.sizes import is_in_pieces
from .smaller_batches import DataBatches, ExampleBatches
from .watch.account import NO_MEMORY, Notice, TrainingFailed

logger = logging.getLogger(__name__)

DEFAULT_LENGTH = 2048
# What a recipe must say and a plan does not need.
NOT_NEEDED = {"data": "none", "output_dir": "none"}
NO_REPORT = {"report_to": "none"}
# What torch says when a CPU has no more memory, on Linux and on Windows: no class of errors of its own (2.13).
OUT_OF_MEMORY = ("can't allocate memory", "not enough memory", "out of memory")


def read_plan_recipe(model: str, recipe: str, words: list[str]) -> FinetuneArguments:
    """The arguments of a recipe that is only planned with: without data and output folder, and whatever device there
    is here: the host refuses `bf16` and `tf32` where the machine has no GPU for them.

    Raises:
        ValueError: naming the key or the value that is wrong.
    """
    values = NOT_NEEDED | read_recipe(recipe) | NO_REPORT | read_overrides(words) | {"model": model}
    on_cpu: dict[str, Any] = {}
    if isinstance(use_cpu := values.get("use_cpu", False), bool):
        on_cpu["use_cpu"] = True
    if isinstance(values.get("tf32"), bool):
        on_cpu["tf32"] = None  # takes no memory
    args = parse_settings(values | on_cpu, f"Recipe {recipe}")
    args.use_cpu = bool(use_cpu)
    return args


def device_here(args: FinetuneArguments) -> Device:
    """What a recipe would run on, on this machine."""
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if args.use_cpu or accelerator is None:
        return CPU
    return Device(accelerator.type, accelerator.type == "cuda" and torch.cuda.get_device_capability() < (8, 0))


def plan_recipe(
    model: str,
    recipe: str,
    words: list[str],
    length: int | None,
    num_images: int,
    image_size: tuple[int, int],
    capacity: int | None,
    device: Device | None = None,
) -> Iterator[str]:
    """What `vlmoe plan` prints: the parts, where it fits, and where it does not fit or nobody said on what, what
    would take less.

    Args:
        model: a folder or a Hub id.
        recipe: a YAML file, or the name of a shipped recipe.
        words: `key=value` settings.
        length: tokens of a row; None takes the recipe's `max_length`.
        num_images: images of a row.
        image_size: their width and height in pixels.
        capacity: bytes of the GPU; None where none is named.
        device: what it is to run on; None takes what this machine has.

    Raises:
        ValueError: for what the user can mend.
    """
    args = read_plan_recipe(model, recipe, words)
    device = device or device_here(args)
    config = load_any_config(args)
    processor = load_processor(model, config, **args.hub)
    length = length or args.max_length or DEFAULT_LENGTH

    make_batches = ExampleBatches(processor, length, num_images, image_size)
    batches = make_batches(args.per_device_train_batch_size)
    plan = estimate_largest(config, args, batches, device)
    images = f"{num_images} image{'s' if num_images != 1 else ''} each"
    what = f"{plan.num_rows} x {plan.length} tokens, {images}; {plan.num_trained:,} trained"
    yield f"{model}, {args.method}: {what}; {name_device(device)}"
    yield table(plan)
    if said := packed(config):
        yield said
    # Which GPU would do is asked of what a step takes there.
    is_for_other = capacity is None and device.kind != GPU.kind
    yield fit(estimate_largest(config, args, batches, GPU) if is_for_other else plan, capacity)
    if capacity is not None and plan.fits(capacity):
        return
    yield "With less memory:"
    is_any = False
    for remedy in find_remedies(config, args, make_batches, plan, device):
        is_any = True
        yield list_remedies([remedy], capacity)
    if not is_any:
        yield NOTHING_LOWER


def device_bytes(args: FinetuneArguments) -> int | None:
    """The memory of the GPU that a run is on; None on a CPU."""
    if args.use_cpu or not torch.cuda.is_available():
        return None
    return torch.cuda.get_device_properties(args.device).total_memory


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory has run out, of a GPU or of the machine."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, RuntimeError) and any(words in str(error) for words in OUT_OF_MEMORY)


class RunMemory:
    """What a run's steps take, by the largest batch of its data.

    Args:
        config: the model's.
        processor: the model's.
        rows: what is trained on.
        args: the recipe.
    """

    def __init__(self, config: Any, processor: Any, rows: Any, args: FinetuneArguments):
        self.config, self.processor, self.rows, self.args = config, processor, rows, args
        self.estimated: MemoryPlan | None = None

    def plan(self) -> tuple[MemoryPlan, DataBatches, Device]:
        """The plan, what makes batches of the data, and the device."""
        if is_in_pieces(self.args):
            raise ValueError("each process holds a piece of the model: expected a whole one, as on one process")
        make_batches, device = DataBatches(self.processor, self.rows), device_here(self.args)
        batches = make_batches(self.args.per_device_train_batch_size)
        self.estimated = estimate_largest(self.config, self.args, batches, device)
        return self.estimated, make_batches, device

    def before(self) -> str:
        """One line for before the start; where nothing can be said, why."""
        try:
            plan, _, _ = self.plan()
        except BROKEN as error:  # a run is not to fail for want of an estimate
            return f"Memory: no estimate, because {error}"
        capacity = device_bytes(self.args)
        said = " ".join(filter(None, (one_line(plan), packed(self.config))))
        if capacity is None or plan.fits(capacity):
            return said
        return f"{said} {fit(plan, capacity)} `vlmoe plan` says what would."

    def after(self, said: str) -> str:
        """What took the memory, and three ways to do with less.

        Args:
            said: what torch said.
        """
        head = f"Memory ran out: {said}"
        try:
            plan, make_batches, device = self.plan()
            capacity = device_bytes(self.args)
            found = list(find_remedies(self.config, self.args, make_batches, plan, device))
            remedies = three_remedies(found, capacity)
        except (MemoryError, *BROKEN) as error:
            if is_out_of_memory(error):
                known = f"{one_line(self.estimated)}\n" if self.estimated is not None else ""
                asked = "There is not even enough to find what takes less: ask `vlmoe plan` in a new process."
                return f"{head}\n{known}{asked}"
            return f"{head}\nThere is no estimate of what took it, because {error}"
        needed = f"A step of {plan.num_rows} x {plan.length} tokens takes {gigabytes(plan.peak)}"
        beside = f", and a GPU's driver {gigabytes(RESERVE)}" if capacity else ""
        ways = list_remedies(remedies, capacity)
        return f"{head}\n{needed}{beside}:\n{table(plan)}\nWith less memory:\n{ways or NOTHING_LOWER}"


def _with_causes(error: BaseException) -> Iterator[BaseException]:
    """An error, and those it came of, once each: they may name each other."""
    seen: list[BaseException] = []
    waiting: list[BaseException | None] = [error]
    while waiting:
        one = waiting.pop()
        if one is None or any(one is other for other in seen):
            continue
        seen.append(one)
        yield one
        waiting += [one.__cause__, one.__context__]


@contextmanager
def explained(memory: RunMemory) -> Iterator[None]:
    """Within it an error that says that memory has run out becomes one that says what took it.

    Raises:
        ValueError: in its place.
    """
    try:
        yield
        return
    except (RuntimeError, MemoryError, OSError) as error:
        if not is_out_of_memory(error):
            raise
        notes = "".join(f" ({note})" for note in getattr(error, "__notes__", []))  # which step, of which rows
        said = (str(error).strip() or type(error).__name__).splitlines()[0] + notes
        for one in _with_causes(error):
            traceback.clear_frames(one.__traceback__)  # they hold activations
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    raise TrainingFailed(Notice(NO_MEMORY, None, memory.after(said)))
