"""Names that survive being a file, a zarr group or a tree node, and come back unchanged."""

from __future__ import annotations

from collections.abc import Iterable
from urllib.parse import quote, unquote

from gradtrace.errors import StoreError

RESERVED = frozenset(
    (
        *("step", "group", "group_other", "scalar", "part", "component", "run"),
        *("loss", "epoch", "scalars", "cost", "n_samples", "recorded"),
    )
)
"""What the root of a tree, of one run or several, calls its own variables: a parameter of that name would collide."""


def node_name(parameter: str) -> str:
    """The tree node of a parameter: its qualified name, with '/' as %2F and '%' as %25.

    A name that a tree cannot hold ('', '.', '..', or one of its root's variables) has its first character escaped too.
    """
    escaped = parameter.replace("%", "%25").replace("/", "%2F")
    if escaped in RESERVED or escaped in (".", ".."):
        return f"%{ord(escaped[0]):02X}{escaped[1:]}"
    return escaped or "%"


def parameter_name(node: str) -> str:
    """The qualified name of the parameter that `node` shows; undoes `node_name`."""
    return "" if node == "%" else unquote(node)


def directory_name(name: str) -> str:
    """`name` as one directory name, readable where it is plain, that every file system takes."""
    escaped = quote(name, safe=" ()+,=@[]{}!")
    return escaped.replace(".", "%2E") if name.startswith(".") else escaped


def original_name(directory: str) -> str:
    """The name that `directory_name` made `directory` of."""
    return unquote(directory)


def check_names(what: str, names: Iterable[str]) -> None:
    """None, or a StoreError naming the first of `names` that cannot be written as UTF-8."""
    for name in names:
        if not isinstance(name, str):
            raise StoreError(f"The {what} {name!r} is a {type(name).__name__}; labels are strings. Pass str(...).")
        try:
            name.encode()
        except UnicodeEncodeError:
            raise StoreError(f"The {what} {name!r} holds a lone surrogate, which is no text. Rename it.") from None
