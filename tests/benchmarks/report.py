"""Results as Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from tests.benchmarks.results import Result, Results
from tests.benchmarks.targets import Targets
from tests.benchmarks.ways import UNTRACED

NONE = "–"
ALL_KINDS = "all kinds"
NOTE = """\
Time of a step to that of the same step untraced (forward, backward, Adam), with what it put off; two groups and the
whole. A star: more than is aimed at. *First steps*: those in which owners are probed. *autospec* measures gradients of
the weights of linear and convolution modules alone."""


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def ratio(value: float) -> str:
    """Three digits, but at least two decimals below ten, where they matter."""
    return f"{value:.2f}" if value < 10 else f"{value:.3g}"


def tables(found: Mapping[str, Results], ways: Sequence[str], aims: Targets) -> str:
    """Two tables of models × ways, by the wall clock and by processor time; a ratio above its aim is marked."""
    named = [way for way in ways if way != UNTRACED]
    rounds = ", ".join(f"{model} {of[UNTRACED].rounds}" for model, of in found.items())
    first = [f"first steps, {ALL_KINDS}"] if ALL_KINDS in named else []
    wall, cpu = [], []
    for model, of in found.items():
        ratios = [_wall(way, of, aims.get((model, way))) for way in named]
        wall.append([model, _step(of[UNTRACED]), *ratios, *(_first(of) for _ in first)])
        cpu.append([model, *(ratio(of[way].cpu) if way in of else NONE for way in named)])
    return "\n\n".join(
        [
            f"{NOTE} Medians over rounds: {rounds}.",
            table(["model", f"{UNTRACED}, ms", *named, *first], wall),
            "The same by processor time, all threads:",
            table(["model", *named], cpu),
        ]
    )


def _step(untraced: Result) -> str:
    """Milliseconds, and half the distance of the quartiles in percent: how noisy the machine was."""
    spread = f" ±{50 * (untraced.high - untraced.low):.0f} %" if untraced.rounds > 1 else ""
    return f"{1000 * untraced.seconds:.3g}{spread}"


def _wall(way: str, of: Results, aim: float | None) -> str:
    if way not in of:
        return NONE
    return ratio(of[way].wall) + " *" * (aim is not None and of[way].wall > aim)


def _first(of: Results) -> str:
    return ratio(of[ALL_KINDS].first_steps) if ALL_KINDS in of else NONE
