"""What the root of merged runs says of each of them, checked as strictly as the root of a run is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gradtrace.errors import StoreError
from gradtrace.store.reading.sanity import checked
from gradtrace.store.schema import COMPONENT, PARAMETER, PROBES, RUN, STEP

RUNS = "runs"  # attribute of the root: label -> all attributes that the run's own root had, and `axes`
AXES = "axes"  # in it, stream -> axis -> where the names of this run stand along it, in the run's own order
RECORDED = "recorded"  # array (run, step): 1 where the run has that step
WIDTHS = "widths"  # attribute of a width class: how many components each parameter has
WIDTHS_OF_RUNS = "widths_of_runs"  # label -> the same in that run, None where it lacks the parameter

Document = Mapping[str, Any]


def checked_runs(document: Document, name: str) -> dict[str, Any]:
    """The root document of merged runs without what is not understood, or a StoreError that says what is wrong."""
    try:
        together = _without_runs(document)
        known = _members(checked(together, name))
        for label in document["attributes"][RUNS]:
            checked(_of_run(together, label), f"{name} (run {label})")
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise StoreError(
            f"{name!r} is damaged: what its root says of the runs in it does not fit together "
            f"({type(error).__name__}: {error}). Restore it from a copy."
        ) from error
    members = {path: one for path, one in _members(document).items() if path in known or _dims(one) == [RUN]}
    return _with_members(document, members)


def _without_runs(document: Document) -> dict[str, Any]:
    """The root that a single run would have that has all that any of the runs has."""
    members, count = {}, len(document["attributes"][RUNS])
    for path, member in _members(document).items():
        if _dims(member)[:1] == [RUN] and member["shape"][0] != count:
            raise ValueError(f"{path} is of {member['shape'][0]} runs, not of {count}")
        if _dims(member) != [RUN]:
            members[path] = _without_first_axis(member) if _dims(member)[:1] == [RUN] else member
    return _with_members(document, members)


def _without_first_axis(array: Document) -> dict[str, Any]:
    codecs = [
        {**codec, "configuration": _cut(codec["configuration"])} if codec["name"] == "sharding_indexed" else codec
        for codec in array["codecs"]
    ]
    grid = {**array["chunk_grid"], "configuration": _cut(array["chunk_grid"]["configuration"])}
    shape, dims = array["shape"][1:], array["dimension_names"][1:]
    return {**array, "shape": shape, "dimension_names": dims, "chunk_grid": grid, "codecs": codecs}


def _cut(chunks: Document) -> dict[str, Any]:
    return {**chunks, "chunk_shape": chunks["chunk_shape"][1:]}


def _of_run(together: Document, label: str) -> dict[str, Any]:
    """The root that one of the runs would have by itself."""
    about, members = together["attributes"][RUNS][label], _members(together)
    found = {path: member for path, member in members.items() if path == PROBES}
    for stream, rows in about["committed"].items():
        lengths = {STEP: rows}
        axes = [path.rpartition("/")[2] for path in members if path.rpartition("/")[0] == stream]
        for axis in [axis for axis in axes if _dims(members[f"{stream}/{axis}"]) == [axis] and axis != STEP]:
            lengths[axis] = _count(about[AXES][stream][axis], members[f"{stream}/{axis}"]["shape"][0])
        for path, member in members.items():
            if path == stream or path.startswith(f"{stream}/"):
                home = path if member["node_type"] == "group" else path.rpartition("/")[0]
                found[path] = _as_of(member, label, lengths, members[home]["attributes"])
    return {**_with_members(together, found), "attributes": about}


def _as_of(member: Document, label: str, lengths: Mapping[str, int], home: Document) -> dict[str, Any]:
    """A member as a run would have it. home: the attributes of the group that it is, or lies in."""
    attributes = member["attributes"]
    if WIDTHS in home:
        of_run = home[WIDTHS_OF_RUNS][label]
        if len(of_run) != len(home[WIDTHS]):
            raise ValueError(f"{len(of_run)} widths are said of {len(home[WIDTHS])} parameters")
        widths = [width for width in of_run if width is not None]
        lengths = {**lengths, PARAMETER: len(widths), COMPONENT: max(widths, default=0)}
        attributes = {WIDTHS: widths} if member["node_type"] == "group" else attributes
    if member["node_type"] == "group":
        return {**member, "attributes": attributes}
    return {
        **member,
        "shape": [lengths.get(dim, size) for dim, size in zip(_dims(member), member["shape"], strict=True)],
    }


def _count(places: Any, most: int) -> int:
    """How many places there are, all different and below `most`; else a ValueError."""
    if not all(type(place) is int and 0 <= place < most for place in places) or len(set(places)) != len(places):
        raise ValueError(f"names stand at {places[:9]} among {most}")
    return len(places)


def _members(document: Document) -> dict[str, Any]:
    found: dict[str, Any] = document["consolidated_metadata"]["metadata"]
    return found


def _with_members(document: Document, members: Document) -> dict[str, Any]:
    return {**document, "consolidated_metadata": {**document["consolidated_metadata"], "metadata": members}}


def _dims(member: Document) -> list[str]:
    return list(member.get("dimension_names") or [])
