"""Whether a root document is what the schema says: looked at once, when a run is opened, before anything else is.

It may be damaged, or made to do harm. What a newer minor version has added is left out where it is not understood.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from gradtrace.errors import StoreError
from gradtrace.store.chunks import shown
from gradtrace.store.forms import ALWAYS, SOMETIMES
from gradtrace.store.names import RESERVED
from gradtrace.store.reading.members import Flaw, Members, form_flaw, is_counts, is_group, stream_flaws
from gradtrace.store.rows import KINDS
from gradtrace.store.schema import GROUP, GROUP_OTHER, MAIN_STREAM, PARAMETER, PROBES, STEP

_KEYS = (
    *("zarr_format", "node_type", "attributes", "shape", "dimension_names", "data_type", "fill_value"),
    *("chunk_grid", "chunk_key_encoding", "codecs", "storage_transformers"),
)
MOST_DEEP = 64  # attributes within attributes
PART_OF_PATH = re.compile(r"[A-Za-z0-9_.~ ()+,=@\[\]{}!%-]+")  # what `names.directory_name` makes, and no more


def checked(document: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The document without what is not understood, or a StoreError that says what is wrong with it, and where."""
    for flaw in flaws(document):
        raise StoreError(
            f"{name!r} is damaged: {flaw}. Restore it from a copy; `gradtrace verify` tells whether more is wrong."
        )
    return _understood(document)


def flaws(document: Mapping[str, Any]) -> Iterator[Flaw]:
    """Everything that is wrong with a root document whose schema version is known.

    What builds on something that is wrong is not looked at.
    """
    if not _is_shallow(document):
        yield Flaw("", f"it is nested more than {MOST_DEEP} levels deep")
        return
    if not _is_node(document) or not is_group(document):
        yield Flaw("", "it is no group of zarr's format 3")
        return
    found = [*_attribute_flaws(document["attributes"])] or [*_tree_flaws(document)]
    if found:
        yield from found
        return
    members, committed = _members(document), document["attributes"]["committed"]
    for path, rows in committed.items():
        yield from stream_flaws(members, path, rows)
    for path in members:
        if path.rpartition("/")[0] == PROBES and path not in committed:
            yield Flaw(path, "nothing is said about how many rows are committed")


def _is_shallow(value: Any) -> bool:
    """Whether something is not nested without end."""
    level = [value]
    for _ in range(MOST_DEEP):
        items = (one.values() if type(one) is dict else one for one in level)
        level = [item for of_one in items for item in of_one if type(item) is dict or type(item) is list]
        if not level:
            return True
    return False


# ---------------------------------------------------------------------- attributes


def _attribute_flaws(attributes: Mapping[str, Any]) -> Iterator[Flaw]:
    missing = _ATTRIBUTES.keys() - attributes.keys()
    if missing:
        yield Flaw("", f"its attributes lack {', '.join(sorted(missing))}")
    for name, (fine, form) in _ATTRIBUTES.items():
        if name in attributes and not fine(attributes[name]):
            yield Flaw("", f"its attribute {name!r} is {shown(attributes[name])}, not {form}")


def _is_committed(value: Any) -> bool:
    if not isinstance(value, dict) or MAIN_STREAM not in value:
        return False
    paths = all(path == MAIN_STREAM or path.rpartition("/")[0] == PROBES for path in value)
    return paths and is_counts(list(value.values()))


def _are_kinds(value: Any) -> bool:
    return isinstance(value, list) and all(kind in KINDS for kind in value) and len(set(value)) == len(value)


def _are_parameters(value: Any) -> bool:
    if not isinstance(value, list):
        return False
    try:
        each = [(one["name"], one["shape"], one["attrs"]) for one in value]
    except (TypeError, KeyError, IndexError):
        return False
    typed = all(type(name) is str and type(shape) is list and type(attrs) is dict for name, shape, attrs in each)
    return typed and is_counts([n for _, shape, _ in each for n in shape]) and len({n for n, *_ in each}) == len(each)


_ATTRIBUTES: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    "committed": (_is_committed, "the number of rows of 'steps' and of each 'probes/<name>'"),
    "closed": (lambda value: isinstance(value, bool), "true or false"),
    "kinds": (_are_kinds, f"a list of {', '.join(KINDS)}"),
    "keep": (lambda value: value is None or (type(value) is int and value > 0), "a positive number or null"),
    "parameters": (_are_parameters, "a list of name, shape and attrs, each name once"),
    "run": (lambda value: isinstance(value, dict), "a mapping"),
}


# ---------------------------------------------------------------------- members


def _members(document: Mapping[str, Any]) -> Members:
    return document["consolidated_metadata"]["metadata"]


def _tree_flaws(document: Mapping[str, Any]) -> Iterator[Flaw]:
    """Of what is below the root: its names, and that what lies in a group has that group."""
    consolidated = document.get("consolidated_metadata")
    inline = isinstance(consolidated, dict) and consolidated.get("kind") == "inline"
    members = consolidated.get("metadata") if isinstance(consolidated, dict) and inline else None
    if not isinstance(members, dict):
        yield Flaw("", "it does not say what is below it (its consolidated metadata)")
        return
    for path, member in members.items():
        names = path.split("/")
        if len(path) > 4096 or not all(PART_OF_PATH.fullmatch(name) and name not in (".", "..") for name in names):
            yield Flaw("", f"it names {shown(path)}, which is no path of a run")
        elif not isinstance(member, dict) or not _is_node(member):
            yield Flaw(path, "it is neither an array nor a group of zarr's format 3")
        elif len(names) > 1 and not is_group(members.get("/".join(names[:-1]))):
            yield Flaw(path, "it lies in no group")


def _is_node(member: Mapping[str, Any]) -> bool:
    known = member.get("zarr_format") == 3 and member.get("node_type") in ("array", "group")
    return known and isinstance(member.get("attributes", {}), dict)


# ---------------------------------------------------------------------- what newer versions add


def _understood(document: Mapping[str, Any]) -> dict[str, Any]:
    """The document without what is not in the schema and cannot be read like the rest."""
    members, committed = _members(document), document["attributes"]["committed"]
    kept = {path: _plain(member) for path, member in members.items() if _is_understood(path, members, committed)}
    consolidated = {"kind": "inline", "must_understand": False, "metadata": kept}
    return {**_plain(document), "consolidated_metadata": consolidated}


def _plain(member: Mapping[str, Any]) -> dict[str, Any]:
    """An array or a group without what no reader of this version knows."""
    return {key: member[key] for key in _KEYS if key in member}


def _is_understood(path: str, members: Members, committed: Mapping[str, int]) -> bool:
    """Whether a member is a group, or an array that may be shown to belong to parameters only if it fits to them."""
    member, (above, _, name) = members[path], path.rpartition("/")
    if member["node_type"] == "group":
        return True
    if form_flaw(member) is not None:
        return False
    dims, stream = member["dimension_names"], above.rpartition("/")[0]
    if PARAMETER not in dims[1:] or name in SOMETIMES or name in ALWAYS:
        return True
    if name in RESERVED or dims[0] != STEP or dims[1] != PARAMETER or not {*dims[2:]} <= {GROUP, GROUP_OTHER}:
        return False
    labels = {dim: f"{above if dim == PARAMETER else stream}/{dim}" for dim in dims[1:]}
    lengths = {dim: members[label]["shape"][0] for dim, label in labels.items() if label in members}
    return len({*dims}) == len(dims) and member["shape"] == [committed.get(stream), *map(lengths.get, dims[1:])]
