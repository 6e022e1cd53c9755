"""The parts of a card's text, each from the facts alone; what is not known is said to be so."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from modeling_vlmoe.companions import HISTORY_NAME, RECEIPT_NAME
from modeling_vlmoe.configuration_vlmoe import PARTS
from modeling_vlmoe.finetune.evaluation_file import EVALUATION_NAME

from .facts import CardFacts
from .licences import licence_name, parent_licence
from .metadata import adapter_base, find_licence

PART_NAMES = {"text": "LLM", "vision": "ViT", "connector": "connector"}
PARENT_NAMES = {"text": "LLM", "vision": "ViT", "vlm": "dense vision-language model"}
# What a run's history tells in a sentence of its own, not in the list of settings.
IN_WORDS = ("max_steps", "num_train_epochs")


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A Markdown table."""
    head = list(head)
    lines = [head, ["---"] * len(head), *map(list, rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def linked(parent: Mapping[str, Any]) -> str:
    """A model's name, with its page where it is on the Hub."""
    hub_id = parent.get("hub_id")
    return f"[{hub_id}](https://huggingface.co/{hub_id})" if hub_id else f"{parent['name']} (not on the Hub)"


def which_layers(layers: Sequence[int] | None) -> str:
    """Where experts are; a run of layers by its ends."""
    if not layers:
        return ""
    if len(layers) > 2 and list(layers) == list(range(layers[0], layers[-1] + 1)):
        return f" in layers {layers[0]} to {layers[-1]}"
    return f" in layer{'s' if len(layers) > 1 else ''} {', '.join(map(str, layers))}"


def experts(moe: Mapping[str, Any] | None) -> str:
    """What a part's sparse layers hold."""
    if moe is None:
        return "dense"
    return f"{moe['num_experts']} experts{which_layers(moe.get('layers'))}, top-{moe['num_experts_per_tok']}"


def describe_parts(facts: CardFacts) -> str:
    """The towers and their experts, one line each."""
    settings = facts.receipt.get("settings", {})
    lines = []
    for part in PARTS:
        shape = ""
        if facts.config is not None:
            moe = facts.config.moe(part)
            moe = None if moe is None else moe.to_dict()
            tower = getattr(facts.config, f"{part}_config", None)
            if tower is not None:
                shape = f"{tower.model_type}, {tower.num_hidden_layers} layers, {tower.hidden_size} wide; "
        elif f"{part}_moe" in settings:
            moe = settings[f"{part}_moe"]
        else:
            continue
        lines.append(f"- {PART_NAMES[part]}: {shape}{experts(moe)}")
    return "\n".join(lines)


def describe_parameters(facts: CardFacts) -> str:
    """Total and active parameters, and an adapter's own."""
    counted = facts.receipt.get("parameters", {})
    if facts.adapter is not None:
        whole = f"{counted['total']:,} ({counted['active']:,} active per token)" if counted else "not known"
        return f"Parameters of the adapter: {facts.num_stored:,}; of the model it belongs to: {whole}."
    total = counted.get("total") or facts.num_stored
    active = f"{counted['active']:,}" if counted else "not known"
    return f"Parameters: {total:,} in total, {active} active per token." if total else "Parameters: not known."


def what_it_is(facts: CardFacts) -> str:
    """A sentence, the parts, the parameters."""
    kind = "A vision-language model with sparse Mixture-of-Experts layers"
    if facts.config is not None and all(facts.config.moe(part) is None for part in PARTS):
        kind = "A dense vision-language model"
    if facts.adapter is not None:
        base = adapter_base(facts)
        of = linked({"hub_id": base}) if base else "a vlmoe model that is not on the Hub"
        kind = f"A LoRA adapter (PEFT) of {of}, a vision-language model with sparse Mixture-of-Experts layers"
    made = ", made of dense pretrained parents by upcycling" if facts.receipt else ""
    tuned = f", tuned in {len(facts.runs)} stage{'s' if len(facts.runs) > 1 else ''}" if facts.runs else ""
    text = [f"{kind}{made}{tuned}.", facts.notes.description, describe_parts(facts), describe_parameters(facts)]
    return "\n\n".join(filter(None, text))


def parent_rows(parents: Mapping[str, Any], depth: int = 0) -> list[list[str]]:
    """One row per parent; a parent's own parents come below it."""
    rows = []
    for role, parent in parents.items():
        licence = licence_name(parent_licence(parent))
        name = f"{'of this: ' * bool(depth)}{PARENT_NAMES.get(role, role)}"
        revision = f"`{parent['revision']}`" if parent.get("revision") else "not known"
        rows.append([name, linked(parent), parent.get("model_type", "not known"), revision, licence])
        rows += parent_rows(parent.get("parents", {}), depth + 1)
    return rows


def describe_parents(facts: CardFacts) -> str:
    """Who the parents are, at which revision, under which licence."""
    parents = facts.receipt.get("parents")
    if not parents:
        return facts.notes.parents or f"Not known: there is no whole `{RECEIPT_NAME}`."
    rows = parent_rows(parents)
    return "\n\n".join(filter(None, [table(["", "model", "type", "revision", "licence"], rows), facts.notes.parents]))


def describe_licence(facts: CardFacts) -> str:
    """What holds for this model, and why."""
    licence = find_licence(facts)
    name = licence_name(licence)
    if name == "unknown":
        return (
            "Unknown: not every parent's licence was stated where it was read. Find out before you use or share "
            "the model."
        )
    links = {parent["name"]: parent_licence(parent) for parent in facts.receipt.get("parents", {}).values()}
    if len({licence_name(one) for one in links.values()}) > 1 and not any(
        run.get("model", {}).get("license") for run in facts.runs
    ):
        each = "; ".join(
            f"{parent}: {licence_name(one)}" + (f" ({one['license_link']})" if one and "license_link" in one else "")
            for parent, one in links.items()
        )
        return f"The parents' licences differ, and both hold: {each}."
    return f"{name}, as its parents." if links else f"{name}."


def describe_upcycling(facts: CardFacts) -> str:
    """The receipt, in short."""
    receipt = facts.receipt
    if "settings" not in receipt:
        return f"Not known: there is no whole `{RECEIPT_NAME}`."
    settings, proof = receipt["settings"], receipt.get("proof", {})
    lines = [f"- experts: {PART_NAMES[part]} {experts(settings.get(f'{part}_moe'))}" for part in PARTS]
    lines += [
        f"- expert init `{settings['expert_init']}`, router init `{settings['router_init']}`, seed {receipt['seed']}",
        f"- dtype {settings['dtype']}, {settings['num_image_tokens']} tokens per image",
    ]
    if "largest_gap" in proof:
        lines.append(
            f"- largest gap to the parents {proof['largest_gap']:.1e} standard deviations "
            f"(limit {proof['largest_gap_limit']:.1e}), measured on the files as they were written"
        )
    if rounded := [cast for cast in settings.get("casts", []) if not cast["is_exact"]]:
        lines += [
            f"- the {PARENT_NAMES[cast['parent']]} was rounded from {cast['source']} to {cast['target']}"
            for cast in rounded
        ]
    versions = ", ".join(f"{name} {version}" for name, version in receipt.get("versions", {}).items())
    lines += [f"- versions: {versions or 'not known'}", f"- everything else: `{RECEIPT_NAME}`"]
    return "\n".join(lines)


def describe_run(run: Mapping[str, Any], number: int) -> str:
    """One stage of training."""
    data = run.get("data") or {}
    name = f"[{data['hub_id']}](https://huggingface.co/datasets/{data['hub_id']})" if data.get("hub_id") else None
    rows = f"{data['rows']} rows" if data.get("rows") is not None else "rows: not known"
    steps = f"{run['steps']} steps" if run.get("steps") is not None else "steps: not known"
    model = run.get("model") or {}
    start = f" of {linked(model)}" if model.get("name") else ""
    revision = f" at `{model['revision']}`" if model.get("revision") else ""
    settings = ", ".join(
        f"{key} {value}" for key, value in run.get("settings", {}).items() if key not in IN_WORDS and value != []
    )
    return (
        f"{number}. `{run.get('method')}`{start}{revision}: data {name or data.get('name') or 'not known'} ({rows}), "
        f"{steps}. Settings: {settings or 'not known'}."
    )


def describe_training(facts: CardFacts) -> str:
    """Every stage, and how far a checkpoint of a Trainer had come."""
    stages = [describe_run(run, number) for number, run in enumerate(facts.runs, 1)]
    if not stages and facts.steps is None:
        nothing = "None after the upcycling, as far as this folder's files know."
        return "\n\n".join(filter(None, [facts.notes.data, nothing]))
    text = ["\n".join(stages) if stages else f"Not known: there is no `{HISTORY_NAME}`."]
    if facts.steps is not None:
        text.append(f"This is the trainer's checkpoint at step {facts.steps}.")
    return "\n\n".join(filter(None, [*text, facts.notes.data or "What is in the data: not stated."]))


def share(values: Mapping[str, Any]) -> str:
    """An accuracy with its interval."""
    low, high = values["interval"]
    return f"{values['accuracy']:.3f} [{low:.3f} {high:.3f}]"


def describe_evaluation(facts: CardFacts) -> str:
    """The accuracy beside its controls, by group where the data names groups."""
    found = facts.evaluation
    if found is None:
        loss = (facts.eval_results or {}).get("eval_loss")
        measured = f" The loss on held-out rows was {loss:.4f}." if loss is not None else ""
        return f"Not measured: there is no `{EVALUATION_NAME}`.{measured}"
    groups = list(found.get("groups", {}))
    rows = [["**this model**", *(share(one) for one in (found, *found.get("groups", {}).values()))]]
    for name, control in found.get("controls", {}).items():
        own = control.get("groups", {})
        rows.append([name, share(control), *(share(own[group]) if group in own else "" for group in groups)])
    counts = (found, *found.get("groups", {}).values())
    rows.append(["n", *(str(one["n"]) for one in counts)])
    data = found.get("data") or {}
    missing = (
        "" if found.get("controls") else "\n\nControls (majority answer, shuffled images, text alone): not measured."
    )
    asked = f"data: {data.get('name') or 'not known'}, n = {found['n']}"
    return f"Measured: {found['metric']}; {asked}.\n\n{table(['', 'all', *groups], rows)}{missing}"


def is_untrained(facts: CardFacts) -> bool:
    """Whether the connector is as it was drawn."""
    return bool(facts.receipt.get("parents")) and "vlm" not in facts.receipt["parents"] and not facts.runs


def describe_use(facts: CardFacts) -> str:
    """What it is for, as its makers say."""
    if facts.notes.intended_use:
        return facts.notes.intended_use
    if is_untrained(facts) and facts.steps is None:
        return (
            "To be tuned: it is the start of a training (`vlmoe finetune align`, then `lora`), not a finished model."
        )
    return "Not stated. It was tuned for the task under Training and is not known to be good for another."


def describe_bias(facts: CardFacts) -> str:
    """What is known of it."""
    return facts.notes.bias or (
        "Not measured. What the parents and the training data carry has to be expected here; their cards say what is "
        "known of them."
    )


def describe_limits(facts: CardFacts) -> str:
    """What follows from how it was made, and what its makers say."""
    text = [facts.notes.limits]
    if is_untrained(facts) and facts.steps is None:
        text.append(
            "Its connector is drawn at random: until it is tuned, what it says about an image means nothing. On text "
            "it answers as its LLM does."
        )
    return "\n\n".join(filter(None, text)) or "Not known, beyond what is under Evaluation."
