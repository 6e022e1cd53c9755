"""The names of parameters as the bare model has them, whatever PEFT, DDP and compilers have put around it."""

# What is around a model and inside it, beside its own names.
PEFT_MODEL = ("base_model", "model")
INSIDE = ("base_layer", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
WHOLE, ADAPTER = "modules_to_save", "lora_"


def bare_name(name: str) -> str:
    """A parameter's name in the bare model; of LoRA's the path of the module that it adapts.

    >>> bare_name("base_model.model.model.layers.0.q_proj.lora_A.default.weight")
    'model.layers.0.q_proj'
    >>> bare_name("module.base_model.model.model.norm.modules_to_save.default.weight")
    'model.norm.weight'
    """
    pieces = name.split(".")
    while pieces and pieces[0] in ("module", *INSIDE):
        pieces = pieces[1:]
    if tuple(pieces[:2]) == PEFT_MODEL:
        pieces = pieces[2:]
    found: list[str] = []
    rest = iter(pieces)
    for piece in rest:
        if piece.startswith(ADAPTER):
            break
        if piece == WHOLE:
            next(rest, None)  # the adapter's name
        elif piece not in (*INSIDE, "original_module"):
            found.append(piece)
    return ".".join(found)


def cells_by_path(cells: dict[str, str]) -> dict[str, str]:
    """The cells of parameters, by their names and by the paths of the modules that hold them.

    Args:
        cells: those of the bare model's parameters (`parameter_cells`).
    """
    found = dict(cells)
    for name, cell in cells.items():
        while name := name.rpartition(".")[0]:
            found.setdefault(name, cell)
    return found


def is_added(name: str) -> bool:
    """Whether PEFT has added a parameter: a pair of LoRA, or the copy of a module that is trained whole."""
    pieces = name.split(".")
    return WHOLE in pieces or any(piece.startswith(ADAPTER) for piece in pieces)
