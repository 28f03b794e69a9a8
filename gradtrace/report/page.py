"""One HTML file out of the data of a report: everything inlined, nothing fetched, and no name taken for markup."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
from collections.abc import Mapping
from importlib.resources import files
from typing import Any

from gradtrace.errors import GradtraceError

ESCAPED = {"<": "\\u003c", ">": "\\u003e", "&": "\\u0026"}
PLACE = re.compile(r"\{\{(\w+)\}\}")
OWN = ("plots.js", "tables.js", "parameter.js", "page.js")


def page_of(data: Mapping[str, Any]) -> str:
    """The whole file. Names in it are data: a policy lets no script run but those that were written here."""
    scripts = {"plotly": plotly_script(), "own": "".join(map(_asset, OWN))}
    if wrong := [name for name in scripts if re.search(r"</script|<!--", scripts[name], re.IGNORECASE)]:
        raise GradtraceError(f"The script {wrong[0]} cannot stand in a page. Install another version of plotly.")
    hashes = " ".join(f"'sha256-{_digest(scripts[name])}'" for name in scripts)
    pieces = {
        **scripts,
        "policy": f"default-src 'none'; script-src {hashes}; style-src 'unsafe-inline'; img-src data: blob:; "
        "base-uri 'none'; form-action 'none'",
        "title": html.escape(str(data["title"])),
        "style": _asset("page.css"),
        "data": embedded(data),
    }
    return PLACE.sub(lambda match: pieces[match[1]], _asset("page.html"))


def embedded(data: Mapping[str, Any]) -> str:
    """JSON that no parser of HTML takes for anything else."""
    text = json.dumps(data, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return re.sub("[<>&]", lambda match: ESCAPED[match[0]], text)


def plotly_script() -> str:
    """Plotly for browsers, as its Python package ships it; a GradtraceError that names the extra without it."""
    try:
        from plotly.offline import get_plotlyjs
    except ModuleNotFoundError as error:
        raise GradtraceError('reports need plotly, which is not installed: pip install "gradtrace[report]"') from error
    return str(get_plotlyjs())


def _asset(name: str) -> str:
    return files("gradtrace.report").joinpath(name).read_text(encoding="utf-8")


def _digest(script: str) -> str:
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
