"""Runs in buckets: an S3 server on loopback, in a process of its own, takes the place of the cloud."""

from __future__ import annotations

import asyncio
import functools
import http.client
import http.server
import itertools
import logging
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import xarray as xr
import zarr
from click.testing import CliRunner

from gradtrace.errors import StoreError
from gradtrace.store.places.bucket import Bucket
from gradtrace.store.places.bucket_errors import scrubbed, told
from gradtrace.store.places.keys import ROOT_KEY, Keys
from gradtrace.store.places.lock import LOCK_KEY, Holder
from gradtrace.store.places.orphans import orphans
from gradtrace.store.places.place import explain, keys_at, may_pass
from gradtrace.store.reading.opened import open_run
from gradtrace.store.rows import KINDS
from gradtrace.store.writing import writer as writing
from gradtrace.store.writing.writer import RunWriter
from tests.store.samples import infos, step_row

ROOT = Path(__file__).parents[2]
KEY, SECRET, TOKEN = "AKIAGRADTRACETESTS77", "s3cr3t/of+these=tests", "tok3n//of+these=tests"
SECRETS = (KEY, SECRET, TOKEN, "AKIAWRONGWRONGWRONG7", "pa55word")
NAMES = ("fc1.weight", "fc1.bias")


class Server(NamedTuple):
    port: int
    log: Path

    def requests(self) -> list[tuple[int, str, str]]:
        """How many were under way when each came, its method and its path."""
        lines = [line.split(" ", 2) for line in self.log.read_text(encoding="utf-8").splitlines()]
        return [(int(count), method, path) for count, method, path in lines]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    log = tmp_path_factory.mktemp("s3") / "requests"
    command = [sys.executable, "-m", "tests.store.s3_server", str(log), KEY]
    process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    port = int(process.stdout.readline())
    for bucket in ("runs", "readonly", "busy"):
        connection = http.client.HTTPConnection("127.0.0.1", port)
        connection.request("PUT", f"/{bucket}")
        assert connection.getresponse().status == 200
        connection.close()
    yield Server(port, log)
    process.communicate()


@pytest.fixture(autouse=True)
def environment(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT", "AWS_REGION", "AWS_DEFAULT_REGION", "AWS_CONDITIONAL_PUT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.port}")
    monkeypatch.setenv("AWS_ALLOW_HTTP", "true")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.setenv("AWS_SESSION_TOKEN", TOKEN)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@pytest.fixture(autouse=True)
def discreet(caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]) -> Iterator[None]:
    """No test logs or prints a credential."""
    caplog.set_level(logging.DEBUG)
    yield
    said = [*capfd.readouterr(), caplog.text]
    assert [secret for secret in SECRETS for text in said if secret in text] == []


_numbers = itertools.count()


@pytest.fixture
def url() -> str:
    """Where nothing is yet; with a space, a letter beyond ASCII, and what URLs would take for something else."""
    return f"s3://runs/my studies/{next(_numbers)} größe 100%25"


def new_writer(url: str, names: Sequence[str] = NAMES, **options: Any) -> RunWriter:
    defaults = {"attrs": {"seed": 7}, "kinds": KINDS, "keep": 64, "parameters": infos(names), "flush_every": 4}
    return RunWriter(url, **{**defaults, **options})


def write(writer: RunWriter, steps: Sequence[int], seed: int = 0) -> None:
    for step in steps:
        row = step_row(step + seed, NAMES)
        writer.append(type(row)(**{**vars(row), "step": step}))


def check(url: str, seeds: Sequence[int]) -> None:
    """The run's rows are those of these seeds, one a step, to the last number."""
    stream = open_run(url).stream()
    assert stream.steps.tolist() == list(range(len(seeds)))
    for name in NAMES:
        expected = [step_row(step + seed, NAMES).parameters[name] for step, seed in enumerate(seeds)]
        for kind in KINDS:
            np.testing.assert_array_equal(stream.read(name, kind), [row.spectra[kind] for row in expected])
        assert (stream.read(name, "status") == 1).all()


def everything(error: BaseException) -> str:
    """All that an error says, in itself and in whatever it is chained to."""
    text, todo, seen = "".join(traceback.format_exception(error)), [error], set()
    while todo:
        one = todo.pop()
        if one is not None and id(one) not in seen:
            seen.add(id(one))
            text += f"{one!s} {one!r} {getattr(one, '__notes__', '')} {getattr(one, 'filename', '')}"
            todo += [one.__cause__, one.__context__, *getattr(one, "exceptions", ())]
    return text


def assert_discreet(error: BaseException) -> None:
    assert [secret for secret in SECRETS if secret in everything(error)] == []


def test_keys(url: str) -> None:
    keys = keys_at(url)
    assert isinstance(keys, Bucket)
    assert keys.name == url
    assert not keys.exists()
    keys.begin()
    keys.make("x/y")
    for key in ("x/y/k", "a b/ü", "p%2Fq/c.0.1", "it's*[1]~&c=d+e"):
        assert keys.get(key) is None
        keys.put(key, key.encode())
        assert keys.get(key) == key.encode()
    assert keys.exists()
    assert not keys.put_new("x/y/k", b"2")
    assert keys.put_new("x/n", b"2")
    assert not keys.swap("x/n", b"1", b"3")
    assert not keys.swap("x/none", b"1", b"3")
    assert keys.swap("x/n", b"2", b"3")
    assert sorted(keys.list()) == sorted(["x/n", "x/y/k", "a b/ü", "p%2Fq/c.0.1", "it's*[1]~&c=d+e"])
    assert sorted(keys.list("x/y/")) == ["x/y/k"]
    assert keys.swap("x/n", b"3", None)
    assert keys.get("x/n") is None
    assert list(keys.list("x/")) == ["x/y/k"]
    assert not keys.swap("x/n", b"3", None)
    assert keys.put_new("x/n", b"4")
    assert keys.get("x/n") == b"4"
    for key in list(keys.list()):
        keys.delete(key)
        keys.delete(key)
    assert list(keys.list()) == []
    assert not keys.exists()


def test_neighbours_are_left_alone(url: str) -> None:
    keys_at(url).put("k", b"1")
    keys_at(f"{url}2").put("k", b"2")
    assert list(keys_at(url).list()) == ["k"]
    assert keys_at(url + "/").name == url


@pytest.mark.parametrize("conditions", ["etag", "disabled"])
def test_of_several_that_come_at_once_one_writes(url: str, monkeypatch: pytest.MonkeyPatch, conditions: str) -> None:
    """Where the server knows no conditions, those that come one after the other are told apart all the same."""
    monkeypatch.setenv("AWS_CONDITIONAL_PUT", conditions)
    keys = keys_at(url)
    threads = 8 if conditions == "etag" else 1
    with ThreadPoolExecutor(threads) as pool:
        for count in range(8):
            new = list(pool.map(lambda i, c=count: keys.put_new(f"n{c}", str(i).encode()), range(8)))
            assert sum(new) == 1
            old = keys.get(f"n{count}") or b""
            assert old == str(new.index(True)).encode()
            assert sum(pool.map(lambda i, c=count, o=old: keys.swap(f"n{c}", o, b"x%d" % i), range(8))) == 1
            old = keys.get(f"n{count}") or b""
            assert sum(pool.map(lambda _, c=count, o=old: keys.swap(f"n{c}", o, None), range(8))) == 1
            assert sum(pool.map(lambda i, c=count: keys.put_new(f"n{c}", b"y%d" % i), range(8))) == 1
    assert sorted(keys.list()) == sorted(f"n{count}" for count in range(8))


def test_a_run_is_read_while_it_is_written_and_when_it_is_closed(url: str) -> None:
    with new_writer(url) as writer:
        assert writer.path == url
        for end in (3, 4, 10):
            write(writer, range(open_run(url).committed["steps"], end))
            writer.flush()
            check(url, [0] * end)
            assert not open_run(url).closed
        writer.append(step_row(10, NAMES), stream="probe/val/a b")
    check(url, [0] * 10)
    assert open_run(url).closed
    assert open_run(url).stream("val/a b").steps.tolist() == [10]
    assert keys_at(url).get(LOCK_KEY) is None
    assert repr(open_run(url)).startswith(f"<Run '{url}'")


def test_a_run_goes_on_and_is_rewound(url: str) -> None:
    with new_writer(url) as writer:
        write(writer, range(11))
    with new_writer(url, resume=True) as writer:
        write(writer, range(11, 14), seed=100)
    check(url, [0] * 11 + [100] * 3)
    before = set(keys_at(url).list())
    with new_writer(url, resume=6) as writer:
        check(url, [0] * 6)
        gone = before - set(keys_at(url).list()) - {LOCK_KEY}
        assert any("/c.2." in key for key in gone), "chunks of rows given up are removed"
        write(writer, range(6, 9), seed=200)
    check(url, [0] * 6 + [200] * 3)


def test_what_a_kill_leaves_is_cleared_away(url: str) -> None:
    """Rows beyond the last commit, and the lock of a process that is gone."""
    with new_writer(url) as writer:
        write(writer, range(6))
    keys = keys_at(url)
    root = keys.get(ROOT_KEY) or b""
    with new_writer(url, resume=True) as writer:
        write(writer, range(6, 14), seed=50)
    keys.put(ROOT_KEY, root)
    keys.put(LOCK_KEY, Holder(**{**vars(Holder.here()), "process": 2**22 + 1}).to_bytes())
    members = open_run(url).group.metadata.consolidated_metadata.flattened_metadata
    documents = {path: one.to_dict() for path, one in members.items()}
    left = {key for key in orphans(keys.list(), documents) if "/c." in key}
    assert left
    with new_writer(url, resume=True) as writer:
        assert not left & set(keys.list())
        write(writer, range(6, 8))
    check(url, [0] * 8)


def test_a_second_writer_is_refused(url: str) -> None:
    with new_writer(url) as writer:
        write(writer, range(2))
        for resume in (False, True):
            with pytest.raises(StoreError, match="is being written by this process"):
                new_writer(url, resume=resume)
    with pytest.raises(StoreError, match="finished gradtrace run"):
        new_writer(url)


def test_a_writer_whose_lock_was_taken_stops(url: str) -> None:
    writer = new_writer(url)
    write(writer, range(2))
    writer.flush()
    keys_at(url).put(LOCK_KEY, Holder.here().to_bytes())
    write(writer, range(2, 4))
    with pytest.raises(StoreError, match="Another process has taken over"):
        writer.close()
    check(url, [0, 0])


def test_xarray_opens_a_closed_run(url: str) -> None:
    with new_writer(url) as writer:
        write(writer, range(5))
    with xr.open_datatree(keys_at(url).to_zarr(), engine="zarr") as tree:  # type: ignore[attr-defined]
        found = tree["steps/w16/gradient"].sel(parameter="fc1.bias", step=3).values
    np.testing.assert_array_equal(found[:3, :5], step_row(3, NAMES).parameters["fc1.bias"].spectra["gradient"])


def test_what_belongs_together_goes_out_at_once_and_before_the_root(url: str, server: Server) -> None:
    begin = len(server.requests())
    with new_writer(url) as writer:
        write(writer, range(4))
    path = url.removeprefix("s3:/")
    puts = [(count, key) for count, method, key in server.requests()[begin:] if method == "PUT" and path in key]
    roots = [place for place, (_, key) in enumerate(puts) if key == f"{path}/{ROOT_KEY}"]
    assert len(roots) >= 3
    for before, root in itertools.pairwise(roots):
        between = [count for count, key in puts[before + 1 : root] if LOCK_KEY not in key]
        assert between == [] or max(between) > 1
    assert puts[roots[-1]][0] == 1, "nothing else is under way when the root is put"


def test_the_order_of_puts_and_deletes_is_kept(url: str) -> None:
    keys = keys_at(url)
    keys.put("gone", b"0")
    with keys.together():
        keys.put("gone", b"1")
        keys.delete("gone")
        keys.delete("back")
        keys.put("back", b"1")
        keys.put("twice", b"1")
        with keys.together():
            keys.put("twice", b"2")
        assert keys.get("twice") is None, "it waits for the outer end"
    assert sorted(keys.list()) == ["back", "twice"]
    assert keys.get("twice") == b"2"


def test_what_could_not_be_put_goes_out_before_anything_else(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = keys_at(url)

    def put_many() -> None:
        with keys.together():
            for number in range(40):
                keys.put(f"b{number}", b"1")

    with monkeypatch.context() as patch:
        patch.setattr(Bucket, "_put", failing(Bucket._put, lambda key, _: key == "b7"))
        with pytest.raises(ConnectionError):
            put_many()
    assert keys.get("b7") is None
    keys.put("root", b"1")
    assert len(list(keys.list())) == 41


def failing(put: Any, fails: Any) -> Any:
    calls = itertools.count()

    def instead(self: Bucket, key: str, *arguments: Any, **options: Any) -> None:
        if fails(key, next(calls)):
            raise ConnectionError("cut off")
        put(self, key, *arguments, **options)

    return instead


@pytest.mark.parametrize("every", [7, 23])
def test_a_server_that_fails_now_and_then_loses_nothing(url: str, monkeypatch: pytest.MonkeyPatch, every: int) -> None:
    monkeypatch.setattr(writing, "RETRY_SECONDS", 0.01)
    monkeypatch.setattr(writing, "COMMIT_SECONDS", 0.2)
    writer = new_writer(url)
    with monkeypatch.context() as patch:
        patch.setattr(Bucket, "_put", failing(Bucket._put, lambda _, count: count % every == every - 1))
        for step in range(9):
            write(writer, [step])
            time.sleep(0.005)
        deadline = time.monotonic() + 20
        while open_run(url).committed["steps"] < 8 and time.monotonic() < deadline:
            time.sleep(0.1)
    writer.close()
    check(url, [0] * 9)


def test_a_run_is_written_from_within_an_event_loop(url: str) -> None:
    """As in a notebook."""

    async def record() -> None:
        with new_writer(url) as writer:
            write(writer, range(5))

    asyncio.run(record())
    check(url, [0] * 5)


@pytest.mark.parametrize("end", ["pass", "raise SystemExit(3)", "raise KeyError('x')"])
def test_a_script_that_ends_without_closing_loses_nothing(url: str, end: str) -> None:
    code = (
        "from tests.store.test_buckets import *\n"
        f"writer = new_writer({url!r})\nwriter.flush()\nwrite(writer, range(6))\n{end}\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == {"pass": 0, "raise SystemExit(3)": 3}.get(end, 1), done.stderr
    assert [secret for secret in SECRETS if secret in done.stdout + done.stderr] == []
    check(url, [0] * 6)
    assert open_run(url).closed


def test_a_missing_bucket_is_named(url: str) -> None:
    for use in (lambda: new_writer("s3://nowhere/run"), lambda: open_run("s3://nowhere/run")):
        with pytest.raises(StoreError, match=r"'s3://nowhere/run'.*there is no such bucket") as caught:
            use()
        assert_discreet(caught.value)
    with pytest.raises(StoreError, match="There is no run at"):
        open_run(url)


def test_wrong_credentials_are_told_without_being_shown(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with new_writer(url) as writer:
        write(writer, range(2))
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIAWRONGWRONGWRONG7")
    for use in (lambda: new_writer(url), lambda: open_run(url)):
        with pytest.raises(StoreError, match=r"403 SignatureDoesNotMatch: check the credentials") as caught:
            use()
        assert_discreet(caught.value)
    with pytest.raises(PermissionError) as denied:
        list(keys_at(url).list())
    assert not may_pass(denied.value)
    with pytest.raises(PermissionError) as denied:
        zarr.open_group(keys_at(url).to_zarr(), mode="r")  # type: ignore[attr-defined]
    assert_discreet(denied.value)


def test_no_permission_to_write_is_told(url: str) -> None:
    with pytest.raises(StoreError, match=r"Cannot create 's3://readonly/run': .*403 AccessDenied.*what they permit\.$"):
        new_writer("s3://readonly/run")


def test_a_busy_server_may_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(OSError, match=r"answers 503.*: it has too much to do") as caught:
        keys_at("s3://busy/run").get("k")
    assert may_pass(caught.value)
    assert_discreet(caught.value)


def test_credentials_that_are_missing_are_asked_for() -> None:
    text = "Error performing PUT http://169.254.169.254/latest/api/token in 5s - HTTP error: error sending request"
    assert "set AWS_ACCESS_KEY_ID" in explain(told(obstore_error(text), "s3://b/k"))


def obstore_error(text: str) -> Exception:
    from obstore.exceptions import GenericError

    return GenericError(text)


def test_a_server_that_is_not_there_is_told_soon(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{closed.getsockname()[1]}")
        began = time.monotonic()
        with pytest.raises(StoreError, match=r"cannot be reached \(Connection refused\).*AWS_ENDPOINT_URL") as caught:
            new_writer(url)
        assert time.monotonic() - began < 10
    assert may_pass(caught.value.__cause__ or caught.value)
    assert_discreet(caught.value)


def test_a_server_that_does_not_answer_is_not_waited_for_without_end(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{silent.getsockname()[1]}")
        monkeypatch.setenv("AWS_TIMEOUT", "200ms")
        began = time.monotonic()
        assert keys_at(url)._store.retry_config["retry_timeout"].total_seconds() <= 30  # type: ignore[attr-defined]
        with pytest.raises(TimeoutError, match="does not answer in time") as caught:
            keys_at(url).get("k")
        assert time.monotonic() - began < 10
    assert may_pass(caught.value)


def test_a_run_whose_server_goes_away_stays_as_it_was(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = new_writer(url)
    write(writer, range(4))
    writer.flush()
    with monkeypatch.context() as patch:
        patch.setattr(Bucket, "_put", failing(Bucket._put, lambda *_: True))
        write(writer, range(4, 6))
        with pytest.raises(StoreError, match=r"(?s)cut off.*the 4 steps committed before stay readable"):
            writer.close()
    check(url, [0] * 4)


def test_an_endpoint_that_is_not_encrypted_or_no_url_is_told(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ALLOW_HTTP")
    with pytest.raises(StoreError, match="set AWS_ALLOW_HTTP=true"):
        new_writer(url)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "localhost:9000")
    with pytest.raises(StoreError, match=r"AWS_ENDPOINT_URL is no URL\. Begin it with"):
        new_writer(url)


@pytest.mark.parametrize(
    "url",
    [
        f"s3://{KEY}:pa55word@runs/x",
        "s3://pa55word@runs/x",
        "s3://runs/x?X-Amz-Signature=pa55word",
        "az://container/x?sig=pa55word",
        "https://user:pa55word@example.org/x",
        "https://example.org/x#pa55word",
        "abfss://container:pa55word@account.dfs.core.windows.net/x",
        "s3://user:pa55word@/x",
        "s3://[pa55word",
        "s3:///x",
        "s3://runs/a//b",
    ],
)
def test_urls_with_credentials_or_without_a_bucket_are_refused(url: str) -> None:
    for use in (open_run, new_writer):
        with pytest.raises(StoreError) as caught:
            use(url)
        assert_discreet(caught.value)


def test_other_clouds_are_opened_by_the_same_library(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is asked of them here."""
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", "account")
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_KEY", "cGE1NXdvcmQ=")
    for url in ("az://container/a b", "abfss://container@account.dfs.core.windows.net/a b", "gs://bucket/a b"):
        assert keys_at(url).name == url
        assert keys_at(url)._store.prefix == "a b"  # type: ignore[attr-defined]
    monkeypatch.delenv("AZURE_STORAGE_ACCOUNT_NAME")
    with pytest.raises(StoreError, match=r"'az://container/x' cannot be used: .*Account must be specified"):
        keys_at("az://container/x")


@pytest.mark.parametrize(
    "text",
    [
        f"failed with {SECRET} and {TOKEN}",
        f"GET https://user:{SECRET[:6]}pa55word@host/path",
        "GET https://host/path?X-Amz-Credential=pa55word&X-Amz-Signature=pa55word",
        "<AWSAccessKeyId>AKIAWRONGWRONGWRONG7</AWSAccessKeyId>",
        "Authorization: pa55word",
        'secret_access_key: "pa55word", next',
        "SharedAccessSignature=pa55word; AccountKey=pa55word",
        "first\npa55word",
    ],
)
def test_texts_of_unknown_errors_are_scrubbed(text: str) -> None:
    assert [secret for secret in SECRETS if secret in scrubbed(text)] == []
    assert_discreet(told(obstore_error(text), "s3://runs/x"))


def test_plain_texts_of_unknown_errors_are_kept() -> None:
    said = told(obstore_error("Generic S3 error: Missing region\n\nDebug source: x"), "s3://runs/x")
    assert explain(said) == "Generic S3 error: Missing region."
    assert told(KeyboardInterrupt(), "s3://runs/x").__class__ is KeyboardInterrupt
    assert isinstance(told(TypeError("ours"), "s3://runs/x"), TypeError)


@pytest.mark.parametrize(
    ("answer", "words", "passes"),
    [
        ("500 Internal Server Error: <Code>InternalError</Code>", "answers 500 InternalError", True),
        ("507 Insufficient Storage: <Code>XMinioStorageFull</Code>", "the bucket is full", True),
        ("301 Moved: <Code>PermanentRedirect</Code>", "set AWS_REGION", False),
        ("400 Bad Request: <Code>AuthorizationHeaderMalformed</Code>", "set AWS_REGION", False),
        ("400 Bad Request: <Code>ExpiredToken</Code><Token>pa55word</Token>", "check the credentials", False),
        ("400 Bad Request: <Code>EntityTooLarge</Code>", "answers 400 EntityTooLarge", False),
        ("501 Not Implemented: <Code>NotImplemented</Code>", "does not offer", False),
    ],
)
def test_answers_are_told_in_plain_words(answer: str, words: str, passes: bool) -> None:
    error = told(obstore_error(f"Generic S3 error: Server returned non-2xx status code: {answer}"), "s3://runs/x")
    assert words in explain(error)
    assert may_pass(error) is passes
    assert_discreet(error)


def test_without_obstore_its_installation_is_advised(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "obstore.store", None)
    with pytest.raises(StoreError, match=r"pip install 'gradtrace\[bucket\]'"):
        open_run(url)


def test_a_run_on_a_web_server_is_read_and_not_written(tmp_path: Path) -> None:
    with new_writer(str(tmp_path / "a b" / "run.zarr")) as writer:
        write(writer, range(5))

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=tmp_path)) as web:
        thread = threading.Thread(target=web.serve_forever)
        thread.start()
        try:
            there = f"http://127.0.0.1:{web.server_address[1]}"
            check(f"{there}/a%20b/run.zarr", [0] * 5)
            with pytest.raises(StoreError, match="There is no run at"):
                open_run(f"{there}/none.zarr")
            with pytest.raises(StoreError, match="a web address is for reading"):
                new_writer(f"{there}/a%20b/run.zarr", resume=True)
            with pytest.raises(StoreError, match="a web server does not tell what it holds"):
                new_writer(f"{there}/new.zarr")
            for change in (lambda keys: keys.put("k", b"1"), lambda keys: keys.delete("k")):
                with pytest.raises(OSError, match="for reading"):
                    change(keys_at(there))
        finally:
            web.shutdown()
            thread.join()


def test_a_training_is_recorded_into_a_bucket_and_asked_on_the_command_line(url: str) -> None:
    import torch

    import gradtrace as gt
    from gradtrace.cli import main

    torch.manual_seed(0)
    model = torch.nn.Linear(4, 2)
    x, labels = torch.randn(6, 4), ["a", "b", "b"] * 2
    with gt.record(model, url) as recorder:
        for _ in range(3):
            with recorder.step(groups={"kind": labels}):
                model(x).square().mean().backward()
            model.zero_grad()
    assert np.isfinite(gt.open_run(url).tree["weight"]["gradient"].sel(group="kind=b")[:, :2]).all()
    keys = keys_at(url)
    data = [keys.get(key) or b"" for key in keys.list()]
    assert len(data) > 20
    assert [secret for secret in SECRETS for part in data if secret.encode() in part] == []
    shown = CliRunner().invoke(main, ["ls", url, "--csv"], catch_exceptions=False)
    assert shown.exit_code == 0
    assert [line.split(",")[0] for line in shown.output.splitlines()] == ["parameter", "weight", "bias"]
    asked = ["query", url, "weight", "--kind", "gradient", "--metric", "sigma1", "--step", "0:2", "--csv"]
    queried = CliRunner().invoke(main, asked, catch_exceptions=False)
    assert queried.exit_code == 0
    assert len(queried.output.splitlines()) == 1 + 3 * 3
    missing = CliRunner().invoke(main, ["info", "s3://nowhere/run"])
    assert missing.exit_code == 1
    assert "there is no such bucket" in missing.output


def test_the_keys_of_a_disk_have_nothing_to_wait_for(tmp_path: Path) -> None:
    keys: Keys = keys_at(tmp_path)
    with keys.together():
        keys.put("k", b"1")
        assert keys.get("k") == b"1"
