"""What went wrong at a bucket, as the errors that a disk would give; nothing in them can open a bucket.

obstore's errors quote requests and answers, in which a server may repeat keys, tokens and signatures. So of those texts
only what is known to be harmless is taken over: status, code, and what the operating system said of a connection.
"""

from __future__ import annotations

import errno
import os
import re

BUILT_IN = (OSError, ValueError, NotImplementedError)  # errors of Python that obstore raises too
NO_BUCKET = ("NoSuchBucket", "ContainerNotFound", "FilesystemNotFound")
NO_RIGHTS = ("401", "403", "ExpiredToken", "InvalidToken", "PermissionDeniedError", "UnauthenticatedError")
NO_ROOM = ("507", "QuotaExceeded", "XMinioStorageFull")
NOT_OFFERED = ("405", "501", "NotImplemented", "NotImplementedError", "NotSupportedError")
BUSY = ("429", "503", "SlowDown")
ELSEWHERE = ("301", "307", "PermanentRedirect", "AuthorizationHeaderMalformed")

_STATUS, _CODE = re.compile(r"status code: (\d{3})"), re.compile(r"<Code>(\w{1,64})</Code>")
_SAID = re.compile(r'(?:message|error): "([\w ,:.()-]{1,120})"|(InvalidCertificate)\b')
_ASKS_THE_MACHINE = re.compile(r"//(?:169\.254\.169\.254|metadata\.google\.internal)\b")
_SECRET_NAME = r"(?:key|secret|token|password|passwd|signature|credential|sig|sas|auth)"
_SECRETS = (
    (re.compile(r"//[^/\s@]*@"), "//"),
    (re.compile(r"\?\S*"), "?..."),
    (re.compile(rf"(?i)([\w-]*{_SECRET_NAME}[\w-]*[\"']?\s*[=:>]\s*)[^\s,;<]+"), r"\1..."),
    (re.compile(r"\b(?:AKIA|ASIA)[A-Z0-9]{8,}"), "..."),
    (re.compile(r"[A-Za-z0-9+/_=-]{32,}"), "..."),
)


def told(error: BaseException, where: str) -> BaseException:
    """The OSError for an error of obstore's, a panic included; any other error, Ctrl-C say, as it is.

    where: the URL of the key, without credentials.
    """
    kind, text = type(error).__name__, str(error)
    if not (type(error).__module__.startswith(("obstore", "pyo3_runtime")) or isinstance(error, BUILT_IN)):
        return error
    status, code = (found[1] if (found := pattern.search(text)) else "" for pattern in (_STATUS, _CODE))
    if kind in ("AlreadyExistsError", "PreconditionError") or status == "412":
        return FileExistsError(errno.EEXIST, "something else is there", where)
    if code in NO_BUCKET or "specified bucket does not exist" in text:
        return OSError(errno.ENXIO, "there is no such bucket; make it first, or check its name and endpoint", where)
    if isinstance(error, FileNotFoundError):
        return FileNotFoundError(errno.ENOENT, "nothing is there", where)
    if _ASKS_THE_MACHINE.search(text):
        return PermissionError(
            errno.EACCES,
            "no credentials are in the environment; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (or those of "
            "another cloud), or AWS_SKIP_SIGNATURE=true for a public bucket",
            where,
        )
    if status or kind in (*NO_RIGHTS, *NOT_OFFERED):
        return _answered({status, code, kind}, " ".join(part for part in (status, code) if part) or kind, where)
    return _not_answered(text, where)


def _answered(words: set[str], answer: str, where: str) -> OSError:
    """The error for what a server answered, by the words in it that tell: status, code, class of error."""
    for known, number, what in (
        (NO_RIGHTS, errno.EACCES, "check the credentials in the environment, and what they permit"),
        (NOT_OFFERED, errno.EOPNOTSUPP, "it does not offer what is needed here"),
        (NO_ROOM, errno.ENOSPC, "the bucket is full; free some space, or record elsewhere"),
        (BUSY, errno.EBUSY, "it has too much to do"),
        (ELSEWHERE, errno.EINVAL, "the bucket is in another region; set AWS_REGION to it"),
    ):
        if not words.isdisjoint(known):
            return OSError(number, f"the server answers {answer}: {what}", where)
    passing = answer.startswith("5")
    return OSError(errno.EIO if passing else errno.EINVAL, f"the server answers {answer}", where)


def _not_answered(text: str, where: str) -> OSError:
    """The error for a request to which there was no answer."""
    if "BadScheme" in text:
        what = "the endpoint is http://, which is not encrypted; use https://, or set AWS_ALLOW_HTTP=true"
        return OSError(errno.EINVAL, what, where)
    if "kind: Timeout" in text:
        return TimeoutError(errno.ETIMEDOUT, "the server does not answer in time", where)
    if "HttpError" in text:
        found = _SAID.search(text)
        said = f" ({found[1] or found[2]})" if found else ""
        what = f"the server cannot be reached{said}; check the network, and AWS_ENDPOINT_URL where one is set"
        return ConnectionError(errno.ECONNABORTED, what, where)
    return OSError(errno.EIO, scrubbed(text), where)


def scrubbed(text: str) -> str:
    """The first line of a text, without anything that looks like a credential or is one of the environment's."""
    line = text.partition("\n")[0][:300]
    for name, value in os.environ.items():
        if re.search(rf"(?i)(?:^|_){_SECRET_NAME}", name) and len(value) > 3:
            line = line.replace(value, "...")
    for pattern, instead in _SECRETS:
        line = pattern.sub(instead, line)
    return line.rstrip(". ")
