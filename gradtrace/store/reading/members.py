"""Whether the arrays of a stream are what the schema says: their dimensions, types, sizes, and how they are packed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from gradtrace.store.chunks import Packing, is_sizes, shown
from gradtrace.store.forms import ALWAYS, LABELS, PER_STEP, SOMETIMES, WIDTH_CLASS, Form
from gradtrace.store.metadata import fill_value
from gradtrace.store.rows import KINDS
from gradtrace.store.schema import COMPONENT, GROUP, GROUP_OTHER, METRIC, PARAMETER, STEP, STRING

Members = Mapping[str, Mapping[str, Any]]

MOST_NAMES = 1 << 20  # of groups, parameters, ...
MOST_WIDE = 1 << 20  # components


class Flaw(NamedTuple):
    """What is wrong with an array, a group or, where the path is empty, the root."""

    path: str
    what: str

    def __str__(self) -> str:
        return f"{self.path!r}: {self.what}" if self.path else self.what


def stream_flaws(members: Members, path: str, rows: int) -> Iterator[Flaw]:
    if not is_group(members.get(path)):
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
    if not is_group(members[path]):
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
    yield from _array_flaws(members, path, {**ALWAYS, **there}, lengths)


def _array_flaws(members: Members, path: str, forms: Mapping[str, Form], lengths: Mapping[str, int]) -> Iterator[Flaw]:
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
    return form_flaw(member)


def form_flaw(member: Mapping[str, Any]) -> str | None:
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
        "fill_value": fill_value(packing.dtype),
        "storage_transformers": [],
    }.items():
        if member.get(key, []) != value:
            return f"its {key} is {shown(member.get(key))}, not {value!r}"
    return None


def _size_flaw(shape: list[int], dims: tuple[str, ...], lengths: Mapping[str, int]) -> str | None:
    """An array is as long as its labels and the committed rows say; a metric may be new, and not yet in every class."""
    for dim, size in zip(dims, shape, strict=True):
        length = lengths.get(dim, size)
        if size > length or (size < length and dim != METRIC):
            what = f"{length} rows are committed" if dim == STEP else f"there are {length} of {dim!r}"
            return f"it has {size} along {dim!r}, and {what}"
    return None


def is_counts(values: Any) -> bool:
    """Whether something is a list of numbers of things."""
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 2**48 for value in values)


def is_group(member: Any) -> bool:
    """Whether a member is there and is a group."""
    return isinstance(member, dict) and member.get("node_type") == "group"
