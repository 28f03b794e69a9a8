"""Which groups a page shows, and which of them it compares."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

from gradtrace.errors import SelectionError, nearest
from gradtrace.inference.asking import MISSING
from gradtrace.inference.series import WHOLE

MOST = 6  # groups of a grouping: more curves are not told apart
MOST_SHOWN = 13  # groups on a page


@dataclass(frozen=True)
class Choice:
    """shown: names of groups, of the whole batch first. compared: what is compared -> its groups. notes: sentences on
    what was left out."""

    shown: tuple[str, ...]
    compared: Mapping[str, tuple[str, ...]]
    notes: tuple[str, ...] = ()

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """Those whose cosines are shown."""
        return [
            pair for names in self.compared.values() for pair in combinations([n for n in names if n in self.shown], 2)
        ]


def choose(samples: Mapping[str, int], asked: Sequence[str] = ()) -> Choice:
    """samples: group -> how many it had in all steps. asked: names or groupings; by default every grouping."""
    compared, notes = _asked(samples, asked) if asked else _groupings(samples)
    names = dict.fromkeys(name for groups in compared.values() for name in groups)
    shown = [*([WHOLE] if WHOLE in samples else []), *(name for name in names if name != WHOLE)]
    if len(shown) > MOST_SHOWN:
        notes.append(f"Curves of {MOST_SHOWN} of {len(shown)} groups are shown; --group chooses others.")
    return Choice(tuple(shown[:MOST_SHOWN]), {n: g for n, g in compared.items() if len(g) > 1}, tuple(notes))


def _groupings(samples: Mapping[str, int]) -> tuple[dict[str, tuple[str, ...]], list[str]]:
    found, notes = dict[str, tuple[str, ...]](), []
    for grouping in dict.fromkeys(name.partition("=")[0] for name in samples if "=" in name):
        names, note = _largest(grouping, samples)
        found[grouping] = names
        notes += [note] if note else []
        if len(names) < 2:
            notes.append(f"{grouping} has fewer than two groups with a label: there is nothing to compare.")
    if not found:
        notes.append("The samples were in no groups: there is nothing to compare.")
    return found, notes


def _largest(grouping: str, samples: Mapping[str, int]) -> tuple[tuple[str, ...], str | None]:
    names = [name for name in samples if name.startswith(f"{grouping}=") and not name.endswith(MISSING)]
    if len(names) <= MOST:
        return tuple(names), None
    largest = sorted(names, key=lambda name: -samples[name])[:MOST]
    return (
        tuple(name for name in names if name in largest),
        f"Of the {len(names)} groups of {grouping}, the {MOST} with most samples are shown; --group chooses others.",
    )


def _asked(samples: Mapping[str, int], asked: Sequence[str]) -> tuple[dict[str, tuple[str, ...]], list[str]]:
    names, notes = dict[str, None](), []
    for name in asked:
        of_grouping, note = _largest(name, samples)
        if name not in samples and not of_grouping:
            raise SelectionError(f"There is no group {name!r} in this run. {nearest(name, list(samples))}")
        names |= dict.fromkeys([name] if name in samples else of_grouping)
        notes += [note] if note and name not in samples else []
    if len(names) < 2:
        notes.append("Only one group was chosen: there is nothing to compare.")
    return {" and ".join(asked): tuple(names)}, notes
