"""Whether a root document is what the schema says: looked at once, when a run is opened, before anything else is.

It may be damaged, or made to do harm. What a newer minor version has added is left out where it is not understood.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from gradtrace.errors import StoreError
from gradtrace.store.chunks import Packing, is_sizes, shown
from gradtrace.store.metadata import STRING
from gradtrace.store.names import RESERVED
from gradtrace.store.rows import KINDS
from gradtrace.store.schema import (
    COMPONENT,
    FILLS,
    GROUP,
    GROUP_OTHER,
    INNER_PRODUCT,
    KIND,
    MAIN_STREAM,
    METRIC,
    METRICS,
    OWNER_RESIDUAL,
    PARAMETER,
    PART,
    PROBES,
    RESIDUAL,
    SCALAR,
    STATUS,
    STEP,
)

Members = Mapping[str, Mapping[str, Any]]

LABELS = (GROUP, GROUP_OTHER, KIND, METRIC, SCALAR, PART)
PER_STEP: Mapping[str, tuple[tuple[str, ...], str]] = {
    STEP: ((STEP,), "int64"),
    "loss": ((STEP,), "float64"),
    "epoch": ((STEP,), "float64"),
    "n_samples": ((STEP, GROUP), "int64"),
    "scalars": ((STEP, SCALAR), "float64"),
    "cost": ((STEP, PART), "float64"),
}
PER_PARAMETER: Mapping[str, tuple[tuple[str, ...], str]] = {
    STATUS: ((STEP, PARAMETER, GROUP, KIND), "uint8"),
    INNER_PRODUCT: ((STEP, PARAMETER, GROUP, GROUP_OTHER), "float32"),
    RESIDUAL: ((STEP, PARAMETER), "float32"),
    OWNER_RESIDUAL: ((STEP, PARAMETER), "float32"),
}
SOMETIMES: Mapping[str, tuple[tuple[str, ...], str]] = {
    METRICS: ((STEP, PARAMETER, GROUP, KIND, METRIC), "float32"),
    **dict.fromkeys(KINDS, ((STEP, PARAMETER, GROUP, COMPONENT), "float32")),
}
"""Arrays of a width class that are there where something was measured that belongs into them."""

_KEYS = (
    *("zarr_format", "node_type", "attributes", "shape", "dimension_names", "data_type", "fill_value"),
    *("chunk_grid", "chunk_key_encoding", "codecs", "storage_transformers"),
)
MOST_NAMES = 1 << 20  # of groups, parameters, ...
MOST_WIDE = 1 << 20  # components
MOST_DEEP = 64  # attributes within attributes
PART_OF_PATH = re.compile(r"[A-Za-z0-9_.~ ()+,=@\[\]{}!%-]+")  # what `names.directory_name` makes, and no more
WIDTH_CLASS = re.compile(r"w[0-9]{1,9}")


class Flaw(NamedTuple):
    """What is wrong with an array, a group or, where the path is empty, the root."""

    path: str
    what: str

    def __str__(self) -> str:
        return f"{self.path!r}: {self.what}" if self.path else self.what


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
    if not _is_node(document) or not _is_group(document):
        yield Flaw("", "it is no group of zarr's format 3")
        return
    found = [*_attribute_flaws(document["attributes"])] or [*_tree_flaws(document)]
    if found:
        yield from found
        return
    members, committed = _members(document), document["attributes"]["committed"]
    for path, rows in committed.items():
        yield from _stream_flaws(members, path, rows)
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


def is_counts(values: Any) -> bool:
    """Whether something is a list of numbers of things."""
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 2**48 for value in values)


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
        elif len(names) > 1 and not _is_group(members.get("/".join(names[:-1]))):
            yield Flaw(path, "it lies in no group")


def _is_node(member: Mapping[str, Any]) -> bool:
    known = member.get("zarr_format") == 3 and member.get("node_type") in ("array", "group")
    return known and isinstance(member.get("attributes", {}), dict)


def _is_group(member: Any) -> bool:
    return isinstance(member, dict) and member.get("node_type") == "group"


def _stream_flaws(members: Members, path: str, rows: int) -> Iterator[Flaw]:
    if not _is_group(members.get(path)):
        yield Flaw(path, "the group is missing")
        return
    lengths = {STEP: rows}
    for name in LABELS:
        yield from _label_flaws(members, path, name, lengths)
    yield from _array_flaws(members, path, PER_STEP, lengths)
    for member in members:
        parent, _, name = member.rpartition("/")
        if parent == path and WIDTH_CLASS.fullmatch(name):
            yield from _class_flaws(members, member, lengths)


def _label_flaws(members: Members, path: str, name: str, lengths: dict[str, int]) -> Iterator[Flaw]:
    """Of a coordinate of names; its length is added to `lengths`."""
    here = f"{path}/{name}"
    flaw = _array_flaw(members.get(here), (name,), STRING)
    if flaw is None:
        lengths[name] = members[here]["shape"][0]
        if lengths[name] > MOST_NAMES:
            flaw = f"it has {lengths[name]} names; at most {MOST_NAMES} are read"
        elif name == GROUP_OTHER and lengths[name] != lengths.get(GROUP, lengths[name]):
            flaw = f"it has {lengths[name]} names, and {GROUP!r} has {lengths[GROUP]}"
    if flaw is not None:
        yield Flaw(here, flaw)


def _class_flaws(members: Members, path: str, of_stream: Mapping[str, int]) -> Iterator[Flaw]:
    if not _is_group(members[path]):
        yield Flaw(path, "it is no group")
        return
    lengths = dict(of_stream)
    yield from _label_flaws(members, path, PARAMETER, lengths)
    there = {name: form for name, form in SOMETIMES.items() if f"{path}/{name}" in members}
    spectra = (members[f"{path}/{kind}"].get("shape") for kind in KINDS if kind in there)
    widest = [shape[-1] for shape in spectra if is_sizes(shape) and shape]
    lengths[COMPONENT] = max(widest, default=0)
    if lengths[COMPONENT] > MOST_WIDE:
        yield Flaw(path, f"it has {lengths[COMPONENT]} components; at most {MOST_WIDE} are read")
    widths = members[path].get("attributes", {}).get("widths")
    count = lengths.get(PARAMETER)
    if not is_counts(widths) or len(widths) != count or max(widths, default=0) > lengths[COMPONENT]:
        yield Flaw(path, f"its attribute 'widths' is {shown(widths)}, not the widths of its {count} parameters")
    yield from _array_flaws(members, path, {**PER_PARAMETER, **there}, lengths)


def _array_flaws(
    members: Members, path: str, forms: Mapping[str, tuple[tuple[str, ...], str]], lengths: Mapping[str, int]
) -> Iterator[Flaw]:
    for name, (dims, dtype) in forms.items():
        here = f"{path}/{name}"
        flaw = _array_flaw(members.get(here), dims, dtype) or _size_flaw(members[here]["shape"], dims, lengths)
        if flaw is not None:
            yield Flaw(here, flaw)


def _array_flaw(member: Mapping[str, Any] | None, dims: tuple[str, ...], dtype: str) -> str | None:
    """What is wrong with an array that has these dimensions and this type."""
    if member is None or member["node_type"] != "array":
        return "the array is missing"
    if member.get("dimension_names") != list(dims):
        return f"its dimensions are {shown(member.get('dimension_names'))}, not {', '.join(dims)}"
    if member.get("data_type") != dtype:
        return f"its type is {shown(member.get('data_type'))}, not {dtype}"
    return _form_flaw(member)


def _form_flaw(member: Mapping[str, Any]) -> str | None:
    """What is wrong with an array whatever it holds."""
    dims, shape = member.get("dimension_names"), member.get("shape")
    if not isinstance(dims, list) or not isinstance(shape, list) or not is_sizes(shape) or len(dims) != len(shape):
        return f"its shape is {shown(shape)}, with dimensions {shown(dims)}"
    try:
        packing = Packing.of(member)
    except ValueError as error:
        return str(error)
    if len(packing.shape) != len(shape):
        return f"its shape is {shown(shape)}, and that of its chunks {shown(list(packing.shape))}"
    for key, value in {
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "."}},
        "fill_value": _fill(packing.dtype),
        "storage_transformers": [],
    }.items():
        if member.get(key, []) != value:
            return f"its {key} is {shown(member.get(key))}, not {value!r}"
    return None


def _fill(dtype: str) -> Any:
    """The fill value as JSON has it."""
    fill = "" if dtype == STRING else FILLS[dtype]
    return "NaN" if isinstance(fill, float) and math.isnan(fill) else fill


def _size_flaw(shape: list[int], dims: tuple[str, ...], lengths: Mapping[str, int]) -> str | None:
    """An array is as long as its labels and the committed rows say; a metric may be new, and not yet in every class."""
    for dim, size in zip(dims, shape, strict=True):
        length = lengths.get(dim, size)
        if size > length or (size < length and dim != METRIC):
            what = f"{length} rows are committed" if dim == STEP else f"there are {length} of {dim!r}"
            return f"it has {size} along {dim!r}, and {what}"
    return None


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
    if _form_flaw(member) is not None:
        return False
    dims, stream = member["dimension_names"], above.rpartition("/")[0]
    if PARAMETER not in dims[1:] or name in SOMETIMES or name in PER_PARAMETER:
        return True
    if name in RESERVED or dims[0] != STEP or dims[1] != PARAMETER or not {*dims[2:]} <= {GROUP, GROUP_OTHER}:
        return False
    labels = {dim: f"{above if dim == PARAMETER else stream}/{dim}" for dim in dims[1:]}
    lengths = {dim: members[label]["shape"][0] for dim, label in labels.items() if label in members}
    return len({*dims}) == len(dims) and member["shape"] == [committed.get(stream), *map(lengths.get, dims[1:])]
