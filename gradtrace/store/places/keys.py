"""Where a store's keys live: bytes under names, written whole or not at all."""

from __future__ import annotations

import contextlib
import os
import uuid
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path

ROOT_KEY = "zarr.json"
PARTIAL = ".partial"  # the ending of a file that is not yet whole, and of one left over from a kill


class Keys(ABC):
    """Keys and their bytes. Every `put` is atomic: a reader sees the old bytes or the new ones, never a part.

    Failures are OSErrors, as of a disk; `gradtrace.store.places.place.explain` says what they mean.
    """

    @property
    @abstractmethod
    def name(self) -> str:
        """How messages call the place; it holds no credentials."""

    @abstractmethod
    def get(self, key: str) -> bytes | None:
        """The bytes under `key`, or None where there are none."""

    @abstractmethod
    def put(self, key: str, data: bytes) -> None:
        """Write `data` under `key`, replacing what was there in one move."""

    @abstractmethod
    def put_new(self, key: str, data: bytes) -> bool:
        """Write `data` under `key` unless something is there; whether it was written. Of several at once one wins."""

    @abstractmethod
    def swap(self, key: str, before: bytes, after: bytes | None) -> bool:
        """Replace `before` by `after` (None: nothing), unless something else is there by now; whether it was done."""

    @abstractmethod
    def delete(self, key: str) -> None:
        """Remove `key`; nothing happens where it is not there."""

    @abstractmethod
    def list(self, prefix: str = "") -> Iterator[str]:
        """Every key that begins with `prefix`, a directory's name with its slash or nothing, in any order."""

    @abstractmethod
    def exists(self) -> bool:
        """Whether anything at all is there."""

    @abstractmethod
    def begin(self) -> None:
        """Make the place itself ready to be written to."""

    def make(self, path: str) -> None:  # noqa: B027 - buckets have no directories
        """Make ready for keys below `path`."""

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """Puts inside may wait until its end and then go out at once, in any order; on a disk they do not.

        It raises what went wrong; what was not put goes out before anything that is put later.
        """
        yield


class Directory(Keys):
    """Keys as files below a directory.

    Written without asyncio or a thread pool, so that it still works while the interpreter shuts down. Directories are
    made once and never again: when somebody deletes the run, writing fails instead of bringing back a stump.
    """

    def __init__(self, root: Path) -> None:
        self.root = root

    @property
    def name(self) -> str:
        return str(self.root)

    def begin(self) -> None:
        self.root.mkdir(parents=True, exist_ok=True)

    def exists(self) -> bool:
        return self.root.exists() and (not self.root.is_dir() or any(self.root.iterdir()))

    def make(self, path: str) -> None:
        here = self.root
        for part in path.split("/"):
            here = here / part
            with contextlib.suppress(FileExistsError):
                here.mkdir()

    def get(self, key: str) -> bytes | None:
        try:
            return (self.root / key).read_bytes()
        except FileNotFoundError:
            return None

    def put(self, key: str, data: bytes) -> None:
        with self._whole(key, data) as partial:
            os.replace(partial, self.root / key)

    def put_new(self, key: str, data: bytes) -> bool:
        with self._whole(key, data) as partial:
            try:
                os.link(partial, self.root / key)  # which, unlike replacing, fails where something is
            except FileExistsError:
                return False
            except OSError:  # a file system without links
                return self._put_new_plainly(key, data)
            return True

    def swap(self, key: str, before: bytes, after: bytes | None) -> bool:
        """Whoever moves the file away has it alone; who finds that it took another one puts it back."""
        taken = self._beside(key)
        try:
            os.rename(self.root / key, taken)
        except FileNotFoundError:
            return False
        if taken.read_bytes() != before:
            with contextlib.suppress(FileExistsError):
                os.link(taken, self.root / key)
            taken.unlink()
            return False
        taken.unlink()
        return after is None or self.put_new(key, after)

    def delete(self, key: str) -> None:
        (self.root / key).unlink(missing_ok=True)

    def list(self, prefix: str = "") -> Iterator[str]:
        for folder, _, names in os.walk(self.root / prefix):
            below = Path(folder).relative_to(self.root)
            yield from ((below / name).as_posix() for name in names)

    def _beside(self, key: str) -> Path:
        target = self.root / key
        return target.with_name(f".{target.name}.{uuid.uuid4().hex[:12]}{PARTIAL}")

    @contextlib.contextmanager
    def _whole(self, key: str, data: bytes) -> Iterator[Path]:
        """A file with these bytes, to be moved to where it belongs; it is gone afterwards."""
        partial = self._beside(key)
        try:
            with open(partial, "xb", buffering=0) as file:
                view = memoryview(data)
                while view:
                    view = view[file.write(view) :]
            yield partial
        finally:
            with contextlib.suppress(OSError):  # the first error is the one to tell
                partial.unlink(missing_ok=True)

    def _put_new_plainly(self, key: str, data: bytes) -> bool:
        try:
            with open(self.root / key, "xb") as file:
                file.write(data)
        except FileExistsError:
            return False
        return True


class Memory(Keys):
    """Keys of this process alone, `memory://name`: for tests, and for looking at a run that nobody keeps."""

    _all: dict[str, dict[str, bytes]] = {}  # noqa: RUF012 - the places of the process

    def __init__(self, name: str) -> None:
        self._name = name

    @property
    def name(self) -> str:
        return f"memory://{self._name}"

    @property
    def _held(self) -> dict[str, bytes]:
        return self._all.setdefault(self._name, {})

    def begin(self) -> None:
        pass

    def exists(self) -> bool:
        return bool(self._held)

    def get(self, key: str) -> bytes | None:
        return self._held.get(key)

    def put(self, key: str, data: bytes) -> None:
        self._held[key] = bytes(data)

    def put_new(self, key: str, data: bytes) -> bool:
        return self._held.setdefault(key, data) is data

    def swap(self, key: str, before: bytes, after: bytes | None) -> bool:
        if self._held.get(key) != before:
            return False
        if after is None:
            del self._held[key]
        else:
            self._held[key] = after
        return True

    def delete(self, key: str) -> None:
        self._held.pop(key, None)

    def list(self, prefix: str = "") -> Iterator[str]:
        yield from [key for key in self._held if key.startswith(prefix)]
