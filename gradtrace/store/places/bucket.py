"""Runs in buckets: `s3://`, `gs://`, `az://` and their like through obstore, and `https://` for reading alone."""

from __future__ import annotations

import contextlib
import errno
import os
import threading
from collections import deque
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar
from urllib.parse import quote, urlsplit

from gradtrace.errors import StoreError
from gradtrace.store.places.bucket_errors import scrubbed, told
from gradtrace.store.places.keys import ROOT_KEY, Keys

if TYPE_CHECKING:
    from obstore.store import ObjectStore, RetryConfig
    from zarr.abc.store import Store

T = TypeVar("T")

WEB = ("http", "https")
USER_IS_PLACE = ("abfs", "abfss")  # container@account
ENDPOINTS = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT")
AT_ONCE = 32  # puts under way
WAITING_BYTES = 64 << 20
NOTHING = b""  # what stands where something was taken away
RETRIES: RetryConfig = {
    "max_retries": 4,
    "retry_timeout": timedelta(seconds=30),
    "backoff": {"init_backoff": timedelta(milliseconds=100), "max_backoff": timedelta(seconds=5), "base": 2},
}


class Found(NamedTuple):
    """An object's bytes, and by what the server tells this version of it from others."""

    data: bytes
    version: dict[str, Any]


class Bucket(Keys):
    """Keys as objects below a URL. Credentials, endpoint and timeouts come from the environment, as obstore reads it.

    An empty object counts as nothing, as the marks do that consoles make for folders: buckets can replace an object on
    condition that it is still the same, but not remove it on that condition, so `swap` leaves an empty one.
    """

    def __init__(self, url: str) -> None:
        self._name, self._is_web = _plain(url), urlsplit(url).scheme in WEB
        self._store = _open(self._name)
        self._waiting: dict[str, bytes] = {}
        self._gathers: int | None = None  # the thread that is in `together`

    @property
    def name(self) -> str:
        return self._name

    def begin(self) -> None:
        self._check_writable("")

    def exists(self) -> bool:
        if self._is_web:
            return self.get(ROOT_KEY) is not None
        return any(self.list())

    def get(self, key: str) -> bytes | None:
        found = self._read(key)
        return found.data if found and found.data else None

    def put(self, key: str, data: bytes) -> None:
        if self._gathers != threading.get_ident():
            self._send()
            self._put(key, data)
            return
        self._waiting[key] = data
        if sum(map(len, self._waiting.values())) > WAITING_BYTES:
            self._send()

    def put_new(self, key: str, data: bytes) -> bool:
        try:
            self._put(key, data, mode="create")
        except FileExistsError:
            found = self._read(key)
            return found is not None and not found.data and self._replace(key, found, data)
        except OSError as error:
            if error.errno != errno.EOPNOTSUPP:
                raise
        else:
            return True
        # The server knows no conditions. Of two that come here within the same moment the second overwrites the first,
        # which notices only if it looks after that: nearly always one writer, and never a mixture of two objects.
        if self.get(key) is not None:
            return False
        self._put(key, data)
        return self.get(key) == data

    def swap(self, key: str, before: bytes, after: bytes | None) -> bool:
        found = self._read(key)
        if found is None or found.data != before:
            return False
        return self._replace(key, found, NOTHING if after is None else after)

    def delete(self, key: str) -> None:
        from obstore import delete

        self._check_writable(key)
        self._waiting.pop(key, None)
        with contextlib.suppress(FileNotFoundError):
            self._ask(key, lambda: delete(self._store, key))

    def list(self, prefix: str = "") -> Iterator[str]:
        from obstore import list as listed

        if self._is_web:
            raise OSError(errno.EOPNOTSUPP, "a web server does not tell what it holds; runs there are read", self._name)
        batches = self._ask(prefix, lambda: [*listed(self._store, prefix or None, chunk_size=1000)])
        yield from (found["path"] for batch in batches for found in batch if found["size"])

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        if self._gathers == threading.get_ident():
            yield
            return
        self._gathers = threading.get_ident()
        try:
            yield
        finally:
            self._gathers = None
        self._send()

    def to_zarr(self) -> Store:
        """The same keys for zarr to read."""
        from gradtrace.store.places.bucket_reading import ReadingStore

        return ReadingStore(self._store, name=self._name)

    def _send(self) -> None:
        """Put all that waits. What fails goes on waiting: nothing that is put later may be there without it.

        By threads, not by obstore's futures: a program that ends soon after one of those is aborted now and then.
        """
        todo, failures = deque(self._waiting.items()), deque[BaseException]()
        others = []
        with contextlib.suppress(RuntimeError):  # no thread is started any more while the interpreter shuts down
            for _ in range(min(len(todo), AT_ONCE) - 1):
                others.append(threading.Thread(target=self._work, args=(todo, failures), daemon=True))
                others[-1].start()
        self._work(todo, failures)
        for thread in others:
            if thread.ident is not None:
                thread.join()
        if failures:
            raise failures[0]

    def _work(self, todo: deque[tuple[str, bytes]], failures: deque[BaseException]) -> None:
        """Put one after the other until none is left, or one fails."""
        while not failures:
            try:
                key, data = todo.popleft()
            except IndexError:
                return
            try:
                self._put(key, data)
                self._waiting.pop(key, None)
            except BaseException as error:
                failures.append(error)

    def _read(self, key: str) -> Found | None:
        """What is there, empty objects included."""
        from obstore import get

        def read() -> Found:
            result = get(self._store, key)
            parts = {"e_tag": result.meta["e_tag"], "version": result.meta["version"]}
            return Found(bytes(result.bytes()), {name: value for name, value in parts.items() if value is not None})

        try:
            return self._ask(key, read)
        except FileNotFoundError:
            return None

    def _replace(self, key: str, found: Found, data: bytes) -> bool:
        """Put `data` unless the object has changed since it was found; whether it was put."""
        try:
            self._put(key, data, mode=found.version)
        except FileExistsError:
            return False
        except OSError as error:
            if error.errno != errno.EOPNOTSUPP:
                raise
            self._put(key, data)  # the server knows no conditions: what came in between is lost, see `put_new`
        return True

    def _put(self, key: str, data: bytes, mode: Any = "overwrite") -> None:
        from obstore import put

        self._check_writable(key)
        self._ask(key, lambda: put(self._store, key, data, mode=mode))

    def _check_writable(self, key: str) -> None:
        if self._is_web:
            raise OSError(errno.EROFS, "a web address is for reading; record to a path or a bucket", self._at(key))

    def _ask(self, key: str, do: Callable[[], T]) -> T:
        """What obstore gives, or an OSError that holds no credentials, nor another error that does."""
        try:
            return do()
        except BaseException as error:
            failure = told(error, self._at(key))
        raise failure  # not while the other one is handled: it would be its context

    def _at(self, key: str) -> str:
        return f"{self._name}/{key}" if key else self._name


def _plain(url: str) -> str:
    """The URL, or a StoreError where it has parts that may hold credentials, which the message does not repeat."""
    try:
        parts = urlsplit(url)
        host, user, password = parts.hostname, parts.username, parts.password
    except ValueError:
        raise StoreError("A URL of a bucket cannot be understood. It looks like s3://bucket/path/run.zarr.") from None
    if not host:
        raise StoreError(f"{scrubbed(url)!r} names no bucket. A URL looks like s3://bucket/path/run.zarr.")
    place = parts.netloc if parts.scheme in USER_IS_PLACE and password is None else parts.netloc.rpartition("@")[2]
    name = f"{parts.scheme}://{place}{parts.path.rstrip('/')}"
    if (user is not None and place != parts.netloc) or parts.query or parts.fragment:
        raise StoreError(
            f"The URL of {name!r} has more to it: a user, or something after ? or #, where credentials may be. Give it "
            "without, and credentials by environment variables (docs/how-to/buckets.md)."
        )
    return name


def _open(url: str) -> ObjectStore:
    """What obstore makes of a URL; it does not ask the server."""
    try:
        from obstore.store import HTTPStore, from_url
    except ModuleNotFoundError:
        raise StoreError(f"{url!r} needs obstore: pip install 'gradtrace[bucket]'.") from None
    scheme, _, rest = url.partition("://")
    wrong = [name for name in ENDPOINTS if not (os.environ.get(name) or "http").startswith("http")]
    if wrong and scheme in ("s3", "s3a"):  # obstore panics
        raise StoreError(f"The environment variable {wrong[0]} is no URL. Begin it with https:// or http://.")
    try:
        if scheme in WEB:
            return HTTPStore.from_url(url, client_options={"allow_http": True}, retry_config=RETRIES)
        return from_url(f"{scheme}://{quote(rest, safe='/@:')}", retry_config=RETRIES)
    except Exception as error:
        said = scrubbed(str(error))
    raise StoreError(f"{url!r} cannot be used: {said}. Check the URL, and the environment variables for it.")
