"""Runs that belong together, folds or seeds, as one archive."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import zarr

from gradtrace.errors import StoreError
from gradtrace.store.archives.archive import Archive, Progress, Size, check_apart, size_of, source_of
from gradtrace.store.archives.stack import Series, Stack
from gradtrace.store.names import check_names
from gradtrace.store.places.place import Where, attributes_of, keys_at
from gradtrace.store.reading.runs import AXES, RUNS
from gradtrace.store.reading.snapshot import Snapshot
from gradtrace.store.schema import PROBES, SCHEMA

MOST_NAMED = 5


class Merged(NamedTuple):
    """What the runs took up, where that can be told, what they take up together, and sentences on how they differ."""

    before: Mapping[str, Size | None]
    after: Size
    notes: tuple[str, ...]


def merge(sources: Mapping[str, Where], target: Where, *, progress: Progress = lambda *_: None) -> Merged:
    """Writes runs as one archive, whose arrays have a `run` dimension first, and compares every value with theirs.

    sources: label -> path or URL. Steps, groups, parameters and metrics are those of all runs; where a run lacks one,
    values are NaN and its status is 0. Raises a `StoreError` as `gradtrace.store.compact` does.
    """
    check_names("label of a run", sources)
    if not sources or "" in sources:
        raise StoreError("Every run needs a label, and there must be one: {'fold1': 'fold1.zarr', ...}.")
    keys, place = {label: keys_at(where) for label, where in sources.items()}, keys_at(target)
    check_apart(list(keys.values()), place)
    for at in keys.values():
        if RUNS in attributes_of(at):
            raise StoreError(f"{at.name!r} holds merged runs already. Give the runs that it was made of.")
    runs = {label: source_of(at) for label, at in keys.items()}
    after = archive_of(runs).write(place, progress)
    return Merged({label: size_of(at) for label, at in keys.items()}, after, tuple(differences(runs)))


def archive_of(runs: Mapping[str, Snapshot]) -> Archive:
    """All that the runs hold."""
    paths = list(dict.fromkeys(path for one in runs.values() for path in one.about["committed"]))
    stacks = [Stack(path, {label: _series(one, path) for label, one in runs.items()}) for path in paths]
    groups = {path: attributes for stack in stacks for path, attributes in stack.groups()}
    if any(path.startswith(f"{PROBES}/") for path in paths):
        groups[PROBES] = {}
    return Archive(
        made_by="merge",
        attributes=_attributes(runs, stacks),
        groups=groups,
        arrays=[content for stack in stacks for content in stack.contents()],
        sources=list(runs.values()),
    )


def _series(one: Snapshot, path: str) -> Series | None:
    group = one.run.group.get(path) if path in one.about["committed"] else None
    return Series(one.run.path, group) if isinstance(group, zarr.Group) else None


def _attributes(runs: Mapping[str, Snapshot], stacks: Sequence[Stack]) -> dict[str, Any]:
    """The root's: what holds for all runs, and under `runs` all that each says of itself."""
    abouts = [one.about for one in runs.values()]
    parameters = {entry["name"]: entry for about in reversed(abouts) for entry in about["parameters"]}
    names = dict.fromkeys(entry["name"] for about in abouts for entry in about["parameters"])
    keeps = [about["keep"] for about in abouts]
    first = abouts[0]["run"]
    return {
        "gradtrace_schema": ".".join(map(str, SCHEMA)),
        "committed": {stack.path: len(stack.steps) for stack in stacks},
        "closed": all(about["closed"] for about in abouts),
        "kinds": list(dict.fromkeys(kind for about in abouts for kind in about["kinds"])),
        "keep": None if None in keeps else max(keeps),
        "parameters": [parameters[name] for name in names],
        "run": {key: value for key, value in first.items() if all(about["run"].get(key) == value for about in abouts)},
        RUNS: {
            label: {**one.about, AXES: {stack.path: stack.axes(label) for stack in stacks if stack.series[label]}}
            for label, one in runs.items()
        },
    }


def differences(runs: Mapping[str, Snapshot]) -> Iterator[str]:
    """What tells apart runs that were expected to be alike, in sentences."""
    opened = {label: one.run for label, one in runs.items()}
    shapes = {label: {name: info.shape for name, info in run.parameters.items()} for label, run in opened.items()}
    yield from _lacking("parameters", shapes)
    for name in _known(shapes):
        yield from _differing(f"The shape of {name!r}", {at: of[name] for at, of in shapes.items() if name in of})
    yield from _differing("What kinds were recorded", {label: ", ".join(run.kinds) for label, run in opened.items()})
    yield from _differing("`keep`", {label: run.keep for label, run in opened.items()})
    yield from _lacking("groups", {label: run.groups for label, run in opened.items()})
    yield from _lacking("probes", {label: run.probe_names for label, run in opened.items()})
    if unfinished := [label for label, run in opened.items() if not run.closed]:
        yield f"Never closed, as after a kill: {_some(unfinished)}."


def _lacking(what: str, found: Mapping[str, Collection[str]]) -> Iterator[str]:
    for label, names in found.items():
        if missing := [name for name in _known(found) if name not in names]:
            yield f"{label} lacks {what} that others have: {_some(missing)}."


def _differing(what: str, found: Mapping[str, Any]) -> Iterator[str]:
    if len(set(found.values())) > 1:
        yield f"{what} differs: {_some([f'{value} in {label}' for label, value in found.items()])}."


def _known(found: Mapping[str, Iterable[str]]) -> list[str]:
    return list(dict.fromkeys(name for names in found.values() for name in names))


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else ""
    return ", ".join(names[:MOST_NAMED]) + more
