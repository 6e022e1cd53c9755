"""The parts of a card's text, each from the facts alone; what is not known is said to be so."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from modeling_vlmoe.companions import HISTORY_NAME, RECEIPT_NAME
from modeling_vlmoe.finetune.evaluation_file import EVALUATION_NAME
from modeling_vlmoe.moe_config import PARTS

from .facts import CardFacts, are_recorded
from .licences import licence_name, parent_licence, stated_otherwise
from .metadata import adapter_base, find_licence, inherited_licence, stated_by
from .routing_words import NEEDS_TEXT, reads_text, routing_words
from .usages import find_usage

PART_NAMES = {"text": "LLM", "vision": "ViT", "connector": "connector"}
PARENT_NAMES = {"text": "LLM", "vision": "ViT", "vlm": "dense vision-language model"}
# What a run's history tells in a sentence of its own, not in the list of settings.
IN_WORDS = ("max_steps", "num_train_epochs")
CHANGED = (
    "The weights are not those that {}: they were changed afterwards by a training, or in another way (merged, "
    "resized, cast), that is not recorded here."
)


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
    kind = f" that share a base, each with pairs of rank {moe['expert_rank']}" if moe.get("expert_rank") else ""
    numbers, where = moe["num_experts"], which_layers(moe.get("layers"))
    number = ", ".join(map(str, numbers)) if isinstance(numbers, list) else numbers
    return f"{number} experts{kind}{where}, top-{moe['num_experts_per_tok']}{routing_words(moe)}"


def describe_tower(config: Any) -> str:
    """What a tower is and how large, as far as its configuration says; Florence-2's ViT has no one depth and width."""
    sizes = {"layers": getattr(config, "num_hidden_layers", None), "wide": getattr(config, "hidden_size", None)}
    return ", ".join([config.model_type, *(f"{size} {what}" for what, size in sizes.items() if size is not None)])


def part_experts(facts: CardFacts) -> dict[str, Any]:
    """The experts' settings of each part of which they are known, None where it is dense."""
    if facts.config is not None:
        moes = {part: facts.config.moe(part) for part in PARTS}
        return {part: None if moe is None else moe.to_dict() for part, moe in moes.items()}
    settings = facts.receipt.get("settings") or {}
    return {part: settings[f"{part}_moe"] for part in PARTS if f"{part}_moe" in settings}


def describe_parts(facts: CardFacts) -> str:
    """The towers and their experts, one line each."""
    lines = []
    for part, moe in part_experts(facts).items():
        tower = getattr(facts.config, f"{part}_config", None)
        shape = "" if tower is None else f"{describe_tower(tower)}; "
        lines.append(f"- {PART_NAMES[part]}: {shape}{experts(moe)}")
    return "\n".join(lines)


# What became of the experts last, by the command's name.
REWRITTEN = {
    "densify": ", its delta experts summed up to whole ones (`vlmoe densify`)",
    "compress": ", its experts compressed to a base and pairs of low rank (`vlmoe compress`), which is another model",
    "convert-routing": ", its LLM routed otherwise by modality (`vlmoe convert-routing`)",
}


def describe_rewriting(facts: CardFacts) -> str:
    """What became of the experts last, and how far results are from those before where they are not the same."""
    if not facts.rewriting:
        return ""
    gaps = ((facts.rewriting.get("gaps") or {}).get("informative") or {}).values()
    measured = f" (results were moved by up to {max(gaps):.1e} standard deviations)" if gaps else ""
    return REWRITTEN[facts.rewriting["kind"]] + measured


def describe_parameters(facts: CardFacts) -> str:
    """Total and active parameters, and an adapter's own."""
    counted = facts.rewriting.get("parameters") or facts.receipt.get("parameters") or {}
    if facts.adapter is not None:
        whole = f"{counted['total']:,} ({counted['active']:,} active per token)" if counted else "not known"
        return f"Parameters of the adapter: {facts.num_stored:,}; of the model it belongs to: {whole}."
    total = facts.num_stored or counted.get("total")
    active = f"{counted['active']:,}" if counted and counted["total"] == total else "not known"
    return f"Parameters: {total:,} in total, {active} active per token." if total else "Parameters: not known."


def what_it_is(facts: CardFacts) -> str:
    """A sentence, the parts, the parameters."""
    kind = f"A {find_usage(facts).kind} with sparse Mixture-of-Experts layers"
    if facts.config is not None and all(facts.config.moe(part) is None for part in PARTS):
        kind = f"A dense {find_usage(facts).kind}"
    if facts.adapter is not None:
        base = adapter_base(facts)
        of = linked({"hub_id": base}) if base else "a vlmoe model that is not on the Hub"
        kind = f"A LoRA adapter (PEFT) of {of}, a {find_usage(facts).kind} with sparse Mixture-of-Experts layers"
    made = ", made of dense pretrained parents by upcycling" if facts.receipt else ""
    tuned = f", tuned in {len(facts.runs)} stage{'s' if len(facts.runs) > 1 else ''}" if facts.runs else ""
    changed = ", and changed in a way that is not recorded" if are_recorded(facts) is False else ""
    text = [
        f"{kind}{made}{tuned}{describe_rewriting(facts)}{changed}.",
        facts.notes.description,
        describe_parts(facts),
        describe_parameters(facts),
    ]
    return "\n\n".join(filter(None, text))


def parent_rows(parents: Mapping[str, Any], depth: int = 0) -> list[list[str]]:
    """One row per parent; a parent's own parents come below it."""
    rows = []
    for role, parent in parents.items():
        licence = licence_name(parent_licence(parent))
        name = f"{'of this: ' * bool(depth)}{PARENT_NAMES.get(role, role)}"
        revision = f"`{parent['revision']}`" if parent.get("revision") else "not known"
        rows.append([name, linked(parent), parent.get("model_type") or "not known", revision, licence])
        rows += parent_rows(parent.get("parents") or {}, depth + 1)
    return rows


def describe_parents(facts: CardFacts) -> str:
    """Who the parents are, at which revision, under which licence."""
    parents = facts.receipt.get("parents")
    if not parents:
        return facts.notes.parents or f"Not known: there is no whole `{RECEIPT_NAME}`."
    rows = parent_rows(parents)
    return "\n\n".join(filter(None, [table(["", "model", "type", "revision", "licence"], rows), facts.notes.parents]))


def licence_conflicts(facts: CardFacts) -> list[str]:
    """Cards that state another licence than follows from what their model was made of, a sentence each."""
    parents = list((facts.receipt.get("parents") or {}).values())
    conflicts = stated_otherwise(parents)
    stated, inherited = stated_by(facts), inherited_licence(facts)
    if stated and parents and licence_name(stated[1]) != licence_name(inherited):
        conflicts = [(*stated, inherited), *conflicts]
    return [
        f"The card of {name} states {licence_name(said)}, but what it was made of is under "
        + ("licences that are not all known." if licence_name(own) == "unknown" else f"{licence_name(own)}.")
        for name, said, own in conflicts
    ]


def describe_licence(facts: CardFacts) -> str:
    """What holds for this model, and who says so."""
    name, stated = licence_name(find_licence(facts)), stated_by(facts)
    if name == "unknown":
        return (
            "Unknown: not every parent's licence was stated where it was read. Find out before you use or share "
            "the model."
        )
    if conflicts := licence_conflicts(facts):
        source = f"as the card of {stated[0]} states" if stated else "as its parents' cards state"
        return f"{name}, {source}. {' '.join(conflicts)} Find out which holds before you use or share the model."
    parents = {parent["name"]: parent_licence(parent) for parent in (facts.receipt.get("parents") or {}).values()}
    if len({licence_name(one) for one in parents.values()}) > 1:
        each = "; ".join(
            f"{parent}: {licence_name(one)}" + (f" ({one['license_link']})" if one and "license_link" in one else "")
            for parent, one in parents.items()
        )
        return f"The parents' licences differ, and both hold: {each}."
    if parents:
        return f"{name}, as its parents."
    return f"{name}, as the card of {stated[0]} states." if stated else f"{name}."


def describe_upcycling(facts: CardFacts) -> str:
    """The receipt, in short."""
    receipt = facts.receipt
    if not receipt.get("settings"):
        return f"Not known: there is no whole `{RECEIPT_NAME}`."
    settings, proof = receipt["settings"], receipt.get("proof") or {}
    lines = [f"- experts: {PART_NAMES[part]} {experts(settings.get(f'{part}_moe'))}" for part in PARTS]
    lines += [
        f"- expert init `{settings['expert_init']}`, router init `{settings['router_init']}`, "
        f"seed {receipt.get('seed', 'not known')}",
        f"- dtype {settings['dtype']}, tokens per image: {settings.get('num_image_tokens') or 'as its size asks for'}",
    ]
    if {"largest_gap", "largest_gap_limit"} <= set(proof):
        lines.append(
            f"- largest gap to the parents {proof['largest_gap']:.1e} standard deviations "
            f"(limit {proof['largest_gap_limit']:.1e}), measured on the files as they were written"
        )
    if lossy := proof.get("lossy"):
        lines.append(
            f"- that is with routing weights that sum to one; the routing as it is moves results by up to "
            f"{max(lossy.values()):.1e} standard deviations"
        )
    if rounded := [cast for cast in settings.get("casts") or [] if not cast["is_exact"]]:
        lines += [
            f"- the {PARENT_NAMES.get(cast['parent'], cast['parent'])} was rounded from {cast['source']} "
            f"to {cast['target']}"
            for cast in rounded
        ]
    versions = ", ".join(f"{name} {version}" for name, version in (receipt.get("versions") or {}).items())
    lines += [f"- versions: {versions or 'not known'}", f"- everything else: `{RECEIPT_NAME}`"]
    return "\n".join(lines)


def describe_run(run: Mapping[str, Any], number: int) -> str:
    """One stage of training."""
    data = run.get("data") or {}
    name = f"[{data['hub_id']}](https://huggingface.co/datasets/{data['hub_id']})" if data.get("hub_id") else None
    rows = f"{data['rows']} rows" if data.get("rows") is not None else "rows: not known"
    if data.get("draws") is not None:
        rows = f"{data['draws']} draws in a pass"
    steps = f"{run['steps']} steps" if run.get("steps") is not None else "steps: not known"
    model = run.get("model") or {}
    start = f" of {linked(model)}" if model.get("name") else ""
    revision = f" at `{model['revision']}`" if model.get("revision") else ""
    settings = ", ".join(
        f"{key} {value}" for key, value in (run.get("settings") or {}).items() if key not in IN_WORDS and value != []
    )
    return (
        f"{number}. `{run.get('method')}`{start}{revision}: data {name or data.get('name') or 'not known'} ({rows}), "
        f"{steps}.{describe_trained(run)} Settings: {settings or 'not known'}."
    )


def describe_trained(run: Mapping[str, Any]) -> str:
    """How much of each part a stage has trained, where that is told."""
    parts = {part: count for part, count in (run.get("trained") or {}).items() if count["trained"]}
    said = ", ".join(f"{part} {count['trained']:,} of {count['of']:,}" for part, count in parts.items())
    return f" Trained parameters: {said}." if said else ""


def describe_change(facts: CardFacts) -> str | None:
    """That the weights are others than the files tell of, where they are."""
    if are_recorded(facts) is not False:
        return None
    return CHANGED.format("the last of these trainings wrote" if facts.runs else "the upcycling wrote")


def describe_no_training(facts: CardFacts) -> str:
    """What is known where no training is told of."""
    if facts.steps is not None or not facts.receipt:
        return f"Not known: there is no `{HISTORY_NAME}`."
    if are_recorded(facts):
        return "None after the upcycling."
    return "None is recorded, and nothing says whether the weights are still those that the upcycling wrote."


def describe_training(facts: CardFacts) -> str:
    """Every stage, what is not recorded, and how far a checkpoint of a Trainer had come."""
    stages = "\n".join(describe_run(run, number) for number, run in enumerate(facts.runs, 1))
    changed = describe_change(facts)
    text: list[str | None] = [stages, changed] if stages or changed else [describe_no_training(facts)]
    if facts.steps is not None:
        text.append(f"This is the trainer's checkpoint at step {facts.steps}.")
    has_data = bool(stages or changed or facts.steps is not None)
    text.append(facts.notes.data or ("What is in the data: not stated." if has_data else None))
    return "\n\n".join(filter(None, text))


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
        why = "does not say that it is about these weights" if facts.has_other_evaluation else None
        return (
            f"Not measured: {f'`{EVALUATION_NAME}` {why}' if why else f'there is no `{EVALUATION_NAME}`'}.{measured}"
        )
    by_group = found.get("groups") or {}
    groups = list(by_group)
    rows = [["**this model**", *(share(one) for one in (found, *by_group.values()))]]
    for name, control in (found.get("controls") or {}).items():
        own = control.get("groups") or {}
        rows.append([name, share(control), *(share(own[group]) if group in own else "" for group in groups)])
    counts = (found, *by_group.values())
    rows.append(["n", *(str(one["n"]) for one in counts)])
    data = found.get("data") or {}
    missing = (
        "" if found.get("controls") else "\n\nControls (majority answer, shuffled images, text alone): not measured."
    )
    asked = f"data: {data.get('name') or 'not known'}, n = {found['n']}"
    return f"Measured: {found['metric']}; {asked}.\n\n{table(['', 'all', *groups], rows)}{missing}"


def is_untrained(facts: CardFacts) -> bool:
    """Whether the connector is known to be as it was drawn."""
    parents = facts.receipt.get("parents")
    return (
        parents is not None and bool(parents) and "vlm" not in parents and not facts.runs and bool(are_recorded(facts))
    )


def describe_use(facts: CardFacts) -> str:
    """What it is for, as its makers say."""
    if facts.notes.intended_use:
        return facts.notes.intended_use
    if is_untrained(facts):
        return (
            "To be tuned: it is the start of a training (`vlmoe finetune align`, then `lora`), not a finished model."
        )
    tuned = " It was tuned for the task under Training and is not known to be good for another."
    return f"Not stated.{tuned if facts.runs else ''}"


def describe_bias(facts: CardFacts) -> str:
    """What is known of it."""
    return facts.notes.bias or (
        "Not measured. What the parents and the training data carry has to be expected here; their cards say what is "
        "known of them."
    )


def describe_limits(facts: CardFacts) -> str:
    """What follows from how it was made, and what its makers say."""
    text = [facts.notes.limits]
    if reads_text(list(part_experts(facts).values())):
        text.append(NEEDS_TEXT)
    if is_untrained(facts):
        text.append(
            "Its connector is drawn at random: until it is tuned, what it says about an image means nothing. On text "
            "it answers as its LLM does."
        )
    return "\n\n".join(filter(None, text)) or "Not known, beyond what is under Evaluation."
