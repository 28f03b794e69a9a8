"""The page about the zoo, generated: `python -m tests.zoo.table > docs/reference/zoo.md`."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.case import Case
from tests.zoo.globs import patterns
from tests.zoo.measured import ZOO, Measured, measured

PAGE = Path(__file__).parents[2] / "docs" / "reference" / "zoo.md"
RUNGS = ("factored", "local", "pulled back", "global", "ungrouped")
WHY = {
    "local": "no adapter claims the op",
    "pulled back": "the op uses something computed from it",
}
HOW = "../explanation/how-a-step-is-measured.md"
HEAD = f"""# Zoo: does it work with my architecture?

Every architecture here is small and random and runs in training mode, dropout included. The tests compare it with
autograd: group by group, the singular values of every parameter's gradient agree to rounding. Found yours? Look at the
column *factored*: of these parameters one gets the spectra of activations and adjoints too. *local*, *pulled back* and
*global* are [other ways]({HOW}#the-ladder-what-did-each-group-contribute) to the same gradients; they cost more. What
is *ungrouped* has no spectra per group.

*elements*: of the parameters that get a gradient. *coupled*: samples see each other inside the model, through batch
norm in training for instance, so that there are [two definitions]({HOW}#coupled-samples) of a group's gradient.

This page is written by `python -m tests.zoo.table > docs/reference/zoo.md`.
"""
LEGEND = """A star stands for the number of a layer, braces for alternatives.
"""


def page() -> str:
    """The whole page in Markdown."""
    sections = "\n".join(section(case) for case in ZOO)
    return f"{HEAD}\n## At a glance\n\n{summary()}\n## One by one\n\n{LEGEND}\n{sections}"


def summary() -> str:
    """A table with one row per architecture, and one for all."""
    lines = ["| architecture | from | parameters | elements | factored | other rungs | coupled |", "|" + " --- |" * 7]
    lines += [_row(f"[{title(c)}](#{anchor(c)})", source(c), [measured(c)]) for c in ZOO]
    lines.append(_row("all", "", [measured(case) for case in ZOO]))
    return "\n".join(lines) + "\n"


def _row(name: str, origin: str, found: list[Measured]) -> str:
    elements = sum(m.elements() for m in found)
    parts = {rung: 100 * sum(m.elements(rung) for m in found) / elements for rung in RUNGS}
    others = ", ".join(f"{rung} {_percent(part)}" for rung, part in parts.items() if part and rung != "factored")
    coupled = any(node.attrs["coupled"] for m in found for node in m.tree.children.values())
    parameters = sum(len(m.sizes) for m in found)
    return (
        f"| {name} | {origin} | {parameters} | {elements} | {_percent(parts['factored'])} | {others} | "
        f"{'yes' if coupled and len(found) == 1 else ''} |"
    )


def _percent(part: float) -> str:
    """Rounded, but never to nothing or all."""
    return "<1 %" if 0 < part < 0.5 else ">99 %" if 99.5 <= part < 100 else f"{part:.0f} %"


def section(case: Case) -> str:
    """A heading and a table with a row for each way in which parameters of the architecture are measured."""
    ways: dict[tuple[str, ...], list[str]] = {}
    for name, node in measured(case).tree.children.items():
        ways.setdefault(_way(node.attrs), []).append(name)
    lines = [f"### {title(case)}", "", "| parameters | op | adapter | rung | why |", "|" + " --- |" * 5]
    for (rung, op, adapter, why), names in sorted(ways.items(), key=lambda item: RUNGS.index(item[0][0].split(",")[0])):
        lines.append(f"| {_code(patterns(names))} | {op} | {adapter} | {rung} | {why} |")
    return "\n".join(lines) + "\n"


def _way(facts: dict[str, Any]) -> tuple[str, ...]:
    rung = facts["rung"]
    why = re.sub(r" \((owner )?residual [^)]*\)", "", facts["reason"]) or WHY.get(rung, "")
    marks = ", coupled" if facts["coupled"] else ""
    return rung + marks, _code(sorted(facts["ops"])), ", ".join(sorted(facts["adapters"])), why.replace("|", "\\|")


def _code(words: list[str]) -> str:
    return ", ".join(f"`{word}`" for word in words)


def title(case: Case) -> str:
    """What people call the architecture."""
    return getattr(case, "title", "") or case.name.replace("_", " ")


def source(case: Case) -> str:
    """The package that it comes from."""
    return getattr(case, "source", "") or "hand-written"


def anchor(case: Case) -> str:
    """The name of the section's heading in links."""
    kept: Iterator[str] = (c for c in title(case).lower() if c.isalnum() or c in " -_")
    return "".join(kept).replace(" ", "-")


if __name__ == "__main__":
    print(page(), end="")
