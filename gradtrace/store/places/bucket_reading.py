"""A bucket as zarr reads it."""

from __future__ import annotations

from collections.abc import Awaitable, Iterable
from typing import TYPE_CHECKING, Any, Self, TypeVar

from zarr.storage import ObjectStore

from gradtrace.store.places.bucket_errors import told

if TYPE_CHECKING:
    from zarr.abc.store import ByteRequest
    from zarr.core.buffer import Buffer, BufferPrototype

T = TypeVar("T")


class ReadingStore(ObjectStore[Any]):
    """zarr's own store for obstore, read-only, with the errors of `gradtrace.store.places.bucket_errors`.

    name: how messages call the place.
    """

    def __init__(self, store: Any, *, read_only: bool = True, name: str = "") -> None:
        super().__init__(store, read_only=read_only)
        self.name = name

    def with_read_only(self, read_only: bool = False) -> Self:
        return type(self)(self.store, read_only=read_only, name=self.name)

    async def get(self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None) -> Buffer | None:
        return await self._told(key, super().get(key, prototype, byte_range))

    async def get_partial_values(
        self, prototype: BufferPrototype, key_ranges: Iterable[tuple[str, ByteRequest | None]]
    ) -> list[Buffer | None]:
        return await self._told("", super().get_partial_values(prototype, key_ranges))

    async def _told(self, key: str, asked: Awaitable[T]) -> T:
        try:
            return await asked
        except BaseException as error:
            failure = told(error, f"{self.name}/{key}")
        raise failure  # not while the other one is handled: it would be its context
