"""`gradtrace plugins` lists what is installed, and a broken plugin does not hide the others."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

from click.testing import Result

Cli = Callable[..., Result]
Shell = Callable[..., "subprocess.CompletedProcess[str]"]

ADAPTERS = """
class Spline:
    ops = ("spline_eval", len)
"""
ENTRIES = """[gradtrace.adapters]
spline = acme_spline:Spline
broken = acme_spline:Missing
gone = acme_gone:Adapter
"""


def install(folder: Path) -> None:
    """Puts a distribution of somebody else's into `folder`, as pip would."""
    (folder / "acme_spline.py").write_text(ADAPTERS)
    information = folder / "acme_spline-1.2.dist-info"
    information.mkdir()
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: acme-spline\nVersion: 1.2\n")
    (information / "entry_points.txt").write_text(ENTRIES)


def test_built_in_adapters_are_listed_with_their_origin(cli: Cli) -> None:
    rows = {row["adapter"]: row for row in json.loads(cli("plugins", "--json").stdout)}
    assert rows["linear"]["distribution"] == "gradtrace"
    assert rows["linear"]["version"]
    assert rows["linear"]["error"] is None


def test_a_plugin_that_fails_is_named_and_the_others_go_on(shell: Shell, tmp_path: Path) -> None:
    install(tmp_path)
    result = shell("plugins", "--json", prelude=f"import sys\nsys.path.insert(0, {str(tmp_path)!r})")
    assert result.returncode == 0
    rows = {row["adapter"]: row for row in json.loads(result.stdout)}
    assert rows["spline"]["ops"] == ["len", "spline_eval"]
    assert (rows["spline"]["distribution"], rows["spline"]["version"]) == ("acme-spline", "1.2")
    assert rows["broken"]["error"].startswith("AttributeError")
    assert rows["gone"]["error"].startswith("ModuleNotFoundError")
    assert rows["linear"]["error"] is None
    assert "The adapter 'gone' of acme-spline cannot be used: ModuleNotFoundError" in result.stderr
