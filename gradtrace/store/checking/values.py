"""Whether what a stream holds can be read and does not contradict itself, some rows of it at a time."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from gradtrace.metrics import METRICS as METRIC_NAMES
from gradtrace.store.checking.blocks import Blocks
from gradtrace.store.checking.finding import CUT, DAMAGE, GIVE_UP, NOTE, RESTORE, Finding
from gradtrace.store.checking.rules import Block, Fault, faults
from gradtrace.store.forms import ALWAYS, LABELS, PER_STEP, WIDTH_CLASS
from gradtrace.store.places.keys import Keys
from gradtrace.store.reading.members import Members
from gradtrace.store.rows import Status
from gradtrace.store.schema import (
    GROUP,
    GROUP_OTHER,
    INNER_PRODUCT,
    KIND,
    METRIC,
    METRICS,
    OWNER_RESIDUAL,
    PARAMETER,
    RESIDUAL,
    SCHEMA,
    STATUS,
    STEP,
)

BLOCK_VALUES = 1 << 21  # numbers looked at together
MOST_ROWS = 256
ASIDE = ("loss", "epoch", "scalars", "cost")  # said beside what was measured: NaN there says that it is not known
ALL = "all"


@dataclass
class _Trouble:
    """Places where the same thing is wrong: how many, the first, and the rows from the first to the last."""

    first: tuple[int, ...]
    rows: tuple[int, int]
    count: int = 0
    lost: str | None = None


@dataclass
class _Stream:
    """A stream being looked at. troubles: (array, what is wrong) -> where."""

    keys: Keys
    members: Members
    about: Mapping[str, Any]
    path: str
    steps: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    n_samples: np.ndarray = field(default_factory=lambda: np.zeros((0, 0), np.int64))
    labels: dict[str, list[str]] = field(default_factory=dict)
    troubles: dict[tuple[str, str], _Trouble] = field(default_factory=dict)

    def blocks(self, name: str) -> Blocks:
        return Blocks(self.keys, f"{self.path}/{name}", self.members[f"{self.path}/{name}"])

    def note(self, array: str, what: str, where: np.ndarray, *, start: int = 0, lost: str | None = None) -> None:
        """Take down where something is wrong: (rows, ...)."""
        if not where.any():
            return
        places = np.argwhere(where)
        first, last = int(places[:, 0].min()) + start, int(places[:, 0].max()) + start
        place = (int(places[0][0]) + start, *map(int, places[0][1:]))
        found = self.troubles.setdefault((array, what), _Trouble(place, (first, last), lost=lost))
        found.count += len(places)
        found.rows = (min(found.rows[0], first), max(found.rows[1], last))

    def spanned(self, first: int, last: int) -> str:
        """The steps of rows, as far as they are known."""
        known = self.steps[first : last + 1]
        return "" if not len(known) else f"{known[0]}:{known[-1]}"

    def bad(self, blocks: Blocks) -> Iterator[Finding]:
        """What chunks of an array cannot be read."""
        for index, why in sorted(blocks.bad.items()):
            first, array = index[0] * blocks.chunks[0], blocks.path.removeprefix(f"{self.path}/")
            of_rows = self.members[blocks.path]["dimension_names"][0] == STEP
            yield Finding(
                DAMAGE,
                f"the chunk {blocks.key(index).rpartition('/')[2]} cannot be read: {why}",
                GIVE_UP if array in ASIDE else _remedy(first if of_rows else 0),
                stream=self.path,
                array=array,
                steps=self.spanned(first, first + blocks.chunks[0] - 1) if of_rows else "",
                row=first if of_rows else None,
                key=blocks.key(index),
            )


def _remedy(row: int) -> str:
    """What to do about damage from a row on."""
    return CUT if row else RESTORE


def stream_findings(keys: Keys, members: Members, about: Mapping[str, Any], path: str) -> Iterator[Finding]:
    """What is wrong with the values of a stream. about: the attributes of the root, which are right."""
    stream = _Stream(keys, members, about, path)
    yield from _steps(stream)
    named = list(_labels(stream, "", LABELS))
    yield from named or _label_contents(stream)
    rows = len(stream.steps)
    tables = {name: stream.blocks(name) for name, (dims, _) in PER_STEP.items() if dims == (STEP,) or not named}
    del tables[STEP]
    values = {name: blocks.rows(0, rows) for name, blocks in tables.items()}
    for blocks in tables.values():
        yield from stream.bad(blocks)
    if not named and not tables["n_samples"].bad:
        stream.n_samples = values["n_samples"]
        stream.note("n_samples", "it is negative", stream.n_samples < 0)
        hidden = np.zeros(len(stream.n_samples), bool)
        for member in members:
            parent, _, name = member.rpartition("/")
            if parent == path and WIDTH_CLASS.fullmatch(name):
                yield from _class(stream, name, hidden)
        _partitions(stream, hidden)
    yield from _told(stream)
    yield from _epochs(stream, values["epoch"])


def _steps(stream: _Stream) -> Iterator[Finding]:
    """What is wrong with the steps. Those that increase, before the first that is missing, are kept: they tell which
    rows there are, and what nothing stands behind is not looked for."""
    blocks = stream.blocks(STEP)
    stream.steps = steps = blocks.until_lost()
    yield from stream.bad(blocks)
    yield from _missing(stream, blocks, STEP, _remedy(len(steps)), row=len(steps))
    wrong = np.flatnonzero(np.diff(steps) <= 0)
    if len(wrong) and not blocks.bad:
        row = int(wrong[0]) + 1
        what = f"steps do not increase: {steps[row - 1]} is followed by {steps[row]}"
        stream.steps = steps[:row]
        yield Finding(DAMAGE, what, CUT, stream=stream.path, array=STEP, row=row)


def _missing(stream: _Stream, blocks: Blocks, array: str, remedy: str, *, row: int | None = None) -> Iterator[Finding]:
    """The chunk that was found to be missing from an array that has all of them."""
    for index in blocks.lost:
        what = f"the chunk {blocks.key(index).rpartition('/')[2]} is missing"
        yield Finding(DAMAGE, what, remedy, stream=stream.path, array=array, row=row, key=blocks.key(index))


def _epochs(stream: _Stream, epochs: np.ndarray) -> Iterator[Finding]:
    known = np.flatnonzero(~np.isnan(epochs))
    back = np.flatnonzero(np.diff(epochs[known]) < 0)
    if len(back):
        row = int(known[back[0] + 1])
        what = f"epochs go back, from {epochs[known[back[0]]]:g} to {epochs[row]:g}"
        remedy = "Nothing is to be done where the training script counted so."
        yield Finding(NOTE, what, remedy, stream=stream.path, array="epoch", steps=stream.spanned(row, row))


# ---------------------------------------------------------------------- names


def _labels(stream: _Stream, below: str, names: Sequence[str]) -> Iterator[Finding]:
    """What is wrong with coordinates of names, which are read into the stream's labels."""
    for name in names:
        blocks = stream.blocks(f"{below}{name}")
        found = stream.labels[f"{below}{name}"] = list(map(str, blocks.until_lost()))
        yield from stream.bad(blocks)
        yield from _missing(stream, blocks, f"{below}{name}", RESTORE)
        twice = [label for label, times in Counter(found).items() if times > 1 or not label]
        if twice and not blocks.bad and not blocks.lost:
            what = f"the name {twice[0]!r} is there twice" if twice[0] else "a name is empty"
            yield Finding(DAMAGE, what, RESTORE, stream=stream.path, array=f"{below}{name}")


def _label_contents(stream: _Stream) -> Iterator[Finding]:
    """Names that other parts of the store say otherwise."""
    labels, about = stream.labels, stream.about
    wrong = {}
    if labels[GROUP] != labels[GROUP_OTHER]:
        wrong[GROUP_OTHER] = f"its names are not those of {GROUP!r}"
    if labels[KIND] != about["kinds"]:
        wrong[KIND] = f"its names are {', '.join(labels[KIND])}, and the run has {', '.join(about['kinds'])}"
    own = about["run"].get("metrics", {})  # what was said of those that somebody added
    unknown = [name for name in labels[METRIC] if name not in METRIC_NAMES and name not in own]
    if unknown and _is_known(about):
        wrong[METRIC] = f"there is no metric {unknown[0]!r}"
    for name, what in wrong.items():
        yield Finding(DAMAGE, what, RESTORE, stream=stream.path, array=name)


def _is_known(about: Mapping[str, Any]) -> bool:
    """Whether a run is of a schema in which nothing is new to this version."""
    return tuple(map(int, about["gradtrace_schema"].split("."))) <= SCHEMA


# ---------------------------------------------------------------------- values


def _class(stream: _Stream, member: str, hidden: np.ndarray) -> Iterator[Finding]:
    """What is wrong in a width class; rows in which groups are hidden are added to `hidden`."""
    wrong = list(_labels(stream, f"{member}/", (PARAMETER,)))
    known = {entry["name"]: entry["shape"] for entry in stream.about["parameters"]}
    names = stream.labels[f"{member}/{PARAMETER}"]
    unknown = [name for name in names if name not in known]
    if unknown and not wrong:
        what = f"it names {unknown[0]!r}, which is not among the run's parameters"
        wrong.append(Finding(DAMAGE, what, RESTORE, stream=stream.path, array=f"{member}/{PARAMETER}"))
    if wrong:
        yield from wrong
        return
    there = [*ALWAYS, METRICS, *stream.about["kinds"]]
    arrays = {n: stream.blocks(f"{member}/{n}") for n in there if f"{stream.path}/{member}/{n}" in stream.members}
    per_row = sum(math.prod(blocks.shape[1:]) for blocks in arrays.values())
    size = max(1, min(MOST_ROWS, BLOCK_VALUES // max(1, per_row)))
    empty = np.array([0 in known.get(name, ()) for name in names], bool)
    for start in range(0, len(stream.steps), size):
        stop = min(start + size, len(stream.steps))
        found = {name: blocks.rows(start, stop) for name, blocks in arrays.items()}
        hidden[start:stop] |= (found[STATUS] == Status.TOO_FEW).any(axis=(1, 2, 3))
        if any(blocks.is_bad(start, stop) for blocks in arrays.values()):
            continue
        for fault in faults(_block(stream, member, found, empty, slice(start, stop))):
            lost = _lost(arrays, fault, start)
            stream.note(f"{member}/{fault.array}", fault.what, fault.where, start=start, lost=lost)
    for blocks in arrays.values():
        yield from stream.bad(blocks)


def _block(stream: _Stream, member: str, found: Mapping[str, np.ndarray], empty: np.ndarray, rows: slice) -> Block:
    kinds = stream.about["kinds"]
    return Block(
        kinds=kinds,
        spectra={kind: found[kind] for kind in kinds if kind in found},
        status=found[STATUS],
        metrics=found.get(METRICS),
        named=stream.labels[METRIC],
        inner_product=found[INNER_PRODUCT],
        residuals={name: found[name] for name in (RESIDUAL, OWNER_RESIDUAL)},
        n_samples=stream.n_samples[rows],
        widths=np.array(stream.members[f"{stream.path}/{member}"]["attributes"]["widths"], int),
        empty=empty,
        keep=stream.about["keep"],
    )


def _lost(arrays: Mapping[str, Blocks], fault: Fault, start: int) -> str | None:
    """A chunk that is not there, where that explains what is wrong."""
    places = np.argwhere(fault.where)
    if not len(places):
        return None
    place = (int(places[0][0]) + start, *map(int, places[0][1:]))
    return next((key for name in (fault.array, STATUS) if (key := arrays[name].lacks(place))), None)


def _partitions(stream: _Stream, hidden: np.ndarray) -> None:
    """The samples of a grouping's groups are those of all, where none are hidden."""
    names, counts = stream.labels[GROUP], stream.n_samples
    parts: dict[str, list[int]] = {}
    for place, name in enumerate(names):
        if "=" in name:
            parts.setdefault(name.partition("=")[0], []).append(place)
    for places in parts.values() if ALL in names else ():
        if any(names[place].count("=") > 1 for place in places):
            continue  # which grouping it is of, the name does not say
        whole, summed = counts[:, names.index(ALL)], counts[:, places].sum(axis=1)
        stream.note(
            "n_samples", "the groups of a grouping do not add up to all", (summed != whole) & (summed > 0) & ~hidden
        )


def _told(stream: _Stream) -> Iterator[Finding]:
    for (array, what), trouble in stream.troubles.items():
        parts = [f"step {stream.steps[trouble.first[0]]}"]
        member, axes = array.rpartition("/")[0], trouble.first[1:]
        if member and axes:
            parts.append(f"parameter {stream.labels[f'{member}/{PARAMETER}'][axes[0]]!r}")
        groups = axes[1:] if member else axes
        parts += [f"group {stream.labels[GROUP][groups[0]]!r}"] if groups else []
        first = f"{what} ({trouble.count} times, first at {', '.join(parts)})"
        yield Finding(
            DAMAGE,
            f"{first}; the chunk {trouble.lost} is missing" if trouble.lost else first,
            _remedy(trouble.rows[0]),
            stream=stream.path,
            array=array,
            steps=stream.spanned(*trouble.rows),
            row=trouble.rows[0],
        )
