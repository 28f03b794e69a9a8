"""The adapter protocol and its registry. Built-in adapters come through the same entry point as anybody's."""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Protocol, TypeGuard, runtime_checkable

from torch import Tensor

from gradtrace.calls import Adjoint, OpCall, Path
from gradtrace.errors import AdapterError
from gradtrace.factors import Factors

GROUP = "gradtrace.adapters"


@runtime_checkable
class Adapter(Protocol):
    """How the gradient of one kind of op factors.

    The contract: for every group, the densified factors equal `torch.func.vjp` of the call with respect to its
    effective weight, for the adjoint masked to the group's rows. `gradtrace.testing.AdapterTests` checks it.
    """

    name: str

    def claims(self, call: OpCall) -> bool: ...

    def factors(self, call: OpCall, adjoint: Tensor) -> Factors: ...


@runtime_checkable
class JointAdapter(Adapter, Protocol):
    """An adapter whose factors come out of one computation for all weights and all outputs of a call.

    A recurrent layer: the adjoints of its output and of its last state run back through the same steps, and add up.
    joint_factors: for every weight of the call (by its path) the factors for all `adjoints` (by output) together.
    """

    def joint_factors(
        self, call: OpCall, weights: Sequence[Path], adjoints: Mapping[int, Adjoint]
    ) -> Mapping[Path, Factors]: ...


@runtime_checkable
class NotingAdapter(Adapter, Protocol):
    """An adapter that needs something of the moment before the call: `note` is asked then, for `OpCall.noted`."""

    def note(self, call: OpCall) -> Any: ...


def is_joint(adapter: Adapter | None) -> TypeGuard[JointAdapter]:
    """Whether it is a JointAdapter: as `isinstance` says, at a twentieth of the time."""
    return hasattr(adapter, "joint_factors")


def is_noting(adapter: Adapter | None) -> TypeGuard[NotingAdapter]:
    """Whether it is a NotingAdapter."""
    return hasattr(adapter, "note")


@dataclass(frozen=True)
class Registered:
    """An adapter and the distribution it came from."""

    adapter: Adapter
    origin: str

    def claims(self, call: OpCall) -> bool:
        """Whether the adapter claims `call`; one that fails at being asked is named."""
        try:
            return self.adapter.claims(call)
        except Exception as error:
            raise AdapterError(
                f"Adapter {self.adapter.name!r} ({self.origin}) failed when asked whether it claims `{call.name}`: "
                f"{type(error).__name__}: {error}. Correct its `claims`, uninstall it, or name the adapters to use: "
                "adapters=[...]."
            ) from error


@dataclass(frozen=True)
class Registry:
    """The adapters in use; `chosen` maps a function's name to the adapter that shall take it, where two claim it."""

    entries: tuple[Registered, ...]
    chosen: Mapping[str, str]
    failed: tuple[str, ...] = ()

    def claimant(self, call: OpCall) -> Adapter | None:
        """The one adapter that claims `call`, or None. Two are an error unless one was chosen."""
        claims = [entry for entry in self.entries if entry.claims(call)]
        if len(claims) <= 1:
            return claims[0].adapter if claims else None
        choice = self.chosen.get(call.name)
        for entry in claims:
            if entry.adapter.name == choice:
                return entry.adapter
        both = ", ".join(f"{entry.adapter.name} ({entry.origin})" for entry in claims)
        raise AdapterError(
            f"`{call.name}` is claimed by several adapters: {both}. "
            f'Choose one with adapters={{"{call.name}": "{claims[0].adapter.name}"}}.'
        )


def registry(choices: Mapping[str, str] | Sequence[Adapter] | None = None) -> Registry:
    """The installed adapters; `choices` settles claims by function name, or gives the adapters to use instead."""
    if choices is not None and not isinstance(choices, Mapping):
        return Registry(tuple(Registered(a, type(a).__module__) for a in choices), {})
    entries, failed = _installed()
    chosen = dict(choices or {})
    known = {entry.adapter.name for entry in entries}
    for function, name in chosen.items():
        if name not in known:
            raise AdapterError(
                f"adapters={{{function!r}: {name!r}}} names no installed adapter. Installed: {sorted(known)}."
            )
    return Registry(entries, chosen, failed)


@functools.cache
def _installed() -> tuple[tuple[Registered, ...], tuple[str, ...]]:
    entries, failed = [], []
    for point in sorted(entry_points(group=GROUP), key=lambda p: (p.name, p.value)):
        try:
            entries.append(Registered(_checked(point.load()()), origin(point)))
        except Exception as error:  # somebody else's import: it must not take the others down, and it is named
            failed.append(f"{point.name} ({origin(point)}): {type(error).__name__}: {error}")
            logging.getLogger("gradtrace").warning(
                "The adapter %s cannot be used; its ops are measured in another way. See `gradtrace plugins list`.",
                failed[-1],
            )
    return tuple(entries), tuple(failed)


def _checked(adapter: object) -> Adapter:
    if not isinstance(adapter, Adapter):
        raise AdapterError(f"`{type(adapter).__name__}` is no adapter: it needs `name`, `claims` and `factors`.")
    return adapter


def origin(point: EntryPoint) -> str:
    """The distribution an entry point comes from, with its version."""
    return f"{point.dist.name} {point.dist.version}" if point.dist else point.value.partition(":")[0]
