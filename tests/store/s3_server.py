"""An S3 server on loopback for tests: moto, one request at a time, so that conditions hold as they do at Amazon's.

`python -m tests.store.s3_server LOG KEY [DELAY]` prints its port, and ends when its stdin does. It refuses other access
keys than KEY, with an answer that repeats what was sent, as S3 does; the bucket `readonly` refuses whatever would
change it, `busy` everything. LOG gets a line for each request: how many are under way, method, path. DELAY: seconds
that each takes besides.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any

REFUSAL = """<?xml version="1.0" encoding="UTF-8"?>
<Error><Code>{code}</Code><Message>No.</Message><AWSAccessKeyId>{key}</AWSAccessKeyId><StringToSign>{sent}</StringToSign>
<SignatureProvided>{sent}</SignatureProvided><Token>{token}</Token></Error>"""


class Server:
    """A WSGI application before moto's."""

    def __init__(self, app: Callable[..., Iterable[bytes]], log: str, key: str, delay: float) -> None:
        self._app, self._log, self._key, self._delay = app, log, key, delay
        self._one, self._counting = threading.Lock(), threading.Lock()
        self._under_way = 0

    def __call__(self, environ: dict[str, Any], start: Callable[..., Any]) -> Iterable[bytes]:
        with self._counting, open(self._log, "a", encoding="utf-8") as log:
            self._under_way += 1
            path = environ["PATH_INFO"].encode("latin-1").decode()
            log.write(f"{self._under_way} {environ['REQUEST_METHOD']} {path}\n")
        try:
            time.sleep(self._delay)
            refusal = self._refusal(environ)
            if refusal is None:
                with self._one:
                    return list(self._app(environ, start))
            environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
            start(refusal[0], [("Content-Type", "application/xml")])
            return [self._text(refusal[1], environ)]
        finally:
            with self._counting:
                self._under_way -= 1

    def _refusal(self, environ: dict[str, Any]) -> tuple[str, str] | None:
        sent, bucket = environ.get("HTTP_AUTHORIZATION", ""), environ["PATH_INFO"].split("/")[1]
        if sent and self._key not in sent:
            return "403 Forbidden", "SignatureDoesNotMatch"
        if bucket == "readonly" and sent and environ["REQUEST_METHOD"] not in ("GET", "HEAD"):
            return "403 Forbidden", "AccessDenied"
        return ("503 Slow Down", "SlowDown") if bucket == "busy" and sent else None

    def _text(self, code: str, environ: dict[str, Any]) -> bytes:
        sent = environ.get("HTTP_AUTHORIZATION", "")
        key, token = sent.partition("Credential=")[2].partition("/")[0], environ.get("HTTP_X_AMZ_SECURITY_TOKEN", "")
        return REFUSAL.format(code=code, key=key, sent=sent, token=token).encode()


def main(log: str, key: str, delay: str = "0") -> None:
    from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import WSGIRequestHandler, make_server

    class Quiet(WSGIRequestHandler):
        protocol_version = "HTTP/1.1"

        def log(self, *_: object) -> None:
            pass

    app = Server(DomainDispatcherApplication(create_backend_app), log, key, float(delay))
    server = make_server("127.0.0.1", 0, app, threaded=True, request_handler=Quiet)
    print(server.server_address[1], flush=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    sys.stdin.read()


if __name__ == "__main__":
    main(*sys.argv[1:])
