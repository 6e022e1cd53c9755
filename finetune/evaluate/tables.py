"""Results as tables, in Markdown and in LaTeX (booktabs)."""

from collections.abc import Mapping, Sequence

from .judging import Judged, Line
from .resampling import CHECKPOINTS, Estimate

ESCAPES = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
ESCAPES |= {"|": r"\textbar{}", "<": r"\textless{}", ">": r"\textgreater{}"}
ESCAPES |= {mark: f"\\{mark}" for mark in "&%$#_{}"}
NOTHING = ""


def spread_words(num_samples: int, num_checkpoints: int) -> str:
    """What the numbers behind a mean are."""
    if num_checkpoints > 1:
        of = f"± the standard deviation over {num_checkpoints} {CHECKPOINTS}"
    else:
        of = "± the standard deviation"
    return (
        f"Mean {of}; in brackets the 95 % interval, over {num_samples} drawings of the rows, which shows no spread "
        "where all rows score alike. The difference is the first column minus the second, row by row."
    )


def table_rows(judged: Judged) -> list[tuple[str, Line | None]]:
    """The lines of a set's table: measures, then the headline by group, and the worst group's gap."""
    rows: list[tuple[str, Line | None]] = [(line.label, line) for line in judged.measures]
    headline = judged.measures[0].label
    for by, groups in judged.groups.items():
        rows.append((f"{headline} by {by}", None))
        for group in groups:
            rows.append((group.name, group.measures[0]))
            if judged.shows_all_by_group:
                rows += [(f"{group.name}: {line.label}", line) for line in group.measures[1:]]
        rows.append((f"all minus the worst ({judged.gaps[by].label})", judged.gaps[by]))
    return rows


def markdown_text(text: str) -> str:
    """A text as a cell of a table holds it."""
    return " ".join(text.split()).replace("|", "\\|")


def markdown_cell(cell: Estimate | None) -> str:
    """An estimate: 0.723 ± 0.012 [0.700 0.745]."""
    if cell is None:
        return NOTHING
    return f"{cell.mean:.3f} ± {cell.std:.3f} [{cell.low:.3f} {cell.high:.3f}]"


def markdown_table(judged: Judged) -> str:
    """A set's table, under its name."""
    head = ["", "n", *judged.columns]
    lines = [head, ["---"] * len(head)]
    for label, line in table_rows(judged):
        if line is None:
            lines.append([f"*{markdown_text(label)}*", *[NOTHING] * (len(head) - 1)])
        else:
            cells = [markdown_cell(line.cells.get(column)) for column in judged.columns]
            lines.append([markdown_text(label), str(line.count), *cells])
    body = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    notes = "".join(f"\n\n{note}" for note in judged.notes)
    return f"### {judged.name}\n\n{body}{notes}"


def latex_text(text: str) -> str:
    """A text with LaTeX's own characters escaped."""
    return "".join(ESCAPES.get(letter, letter) for letter in " ".join(text.split()))


def latex_cell(cell: Estimate | None) -> str:
    """An estimate: $0.723 \\pm 0.012$."""
    return NOTHING if cell is None else f"${cell.mean:.3f} \\pm {cell.std:.3f}$"


def latex_table(judged: Judged) -> str:
    """A set's tabular, for the package booktabs."""
    width = len(judged.columns)
    head = " & ".join(["", "n", *map(latex_text, judged.columns)])
    lines = [f"% {' '.join(judged.name.split())}", f"\\begin{{tabular}}{{lr{'r' * width}}}", "\\toprule"]
    lines += [f"{head.strip()} \\\\", "\\midrule"]
    for label, line in table_rows(judged):
        if line is None:
            lines += ["\\midrule", f"\\multicolumn{{{width + 2}}}{{l}}{{\\emph{{{latex_text(label)}}}}} \\\\"]
        else:
            cells = [latex_cell(line.cells.get(column)) for column in judged.columns]
            lines.append(f"{' & '.join([latex_text(label), str(line.count), *cells])} \\\\")
    return "\n".join([*lines, "\\bottomrule", "\\end{tabular}"])


def said_below(
    num_samples: int,
    num_checkpoints: int,
    missing: Mapping[str, str] | None,
    models: Mapping[str, Sequence[str]] | None,
) -> list[str]:
    """What stands below the tables: what was not measured and why, who is who, and how the spread is to be read."""
    unmeasured = [f"{name}: not measured, {why}." for name, why in (missing or {}).items()]
    who = [f"{column}: {', '.join(names)}" for column, names in (models or {}).items()]
    return [*unmeasured, *([f"{'; '.join(who)}."] if who else []), spread_words(num_samples, num_checkpoints)]


def markdown(
    judged: Sequence[Judged],
    num_samples: int,
    num_checkpoints: int,
    missing: Mapping[str, str] | None = None,
    models: Mapping[str, Sequence[str]] | None = None,
) -> str:
    """All tables, and what is to be said below them.

    Args:
        judged: the sets.
        num_samples: how often rows were drawn again.
        num_checkpoints: how many there are.
        missing: the sets that were not measured, and why.
        models: the names of the models in each column.
    """
    said = said_below(num_samples, num_checkpoints, missing, models)
    return "\n\n".join([*map(markdown_table, judged), *said]) + "\n"


def latex(
    judged: Sequence[Judged],
    num_samples: int,
    num_checkpoints: int,
    missing: Mapping[str, str] | None = None,
    models: Mapping[str, Sequence[str]] | None = None,
) -> str:
    """The same for LaTeX: what is not a table is a comment. For the arguments see `markdown`."""
    said = said_below(num_samples, num_checkpoints, missing, models)
    return "\n\n".join([*map(latex_table, judged), "\n".join(f"% {line}" for line in said)]) + "\n"
