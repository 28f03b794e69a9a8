"""Exit codes, streams and errors of the command line as a whole."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import click
import pytest
from click.testing import Result

import gradtrace.cli
from gradtrace.cli import COMMANDS, main
from gradtrace.errors import StoreError

Cli = Callable[..., Result]
Shell = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], None]], None]:
    """Puts a command of our own in the place of `ls`."""

    def replace(body: Callable[[], None]) -> None:
        module = ModuleType("gradtrace.cli.ls")
        module.command = click.Command("ls", callback=body)  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "gradtrace.cli.ls", module)

    return replace


def test_help_lists_every_command(cli: Cli) -> None:
    result = cli("--help")
    assert result.exit_code == 0
    for name in COMMANDS:
        assert f"  {name} " in result.stdout


def test_only_the_command_used_is_imported(shell: Shell, run_path: Path) -> None:
    prelude = "import atexit, sys\natexit.register(lambda: print([m for m in sys.modules if 'gradtrace.cli.' in m]))"
    shown = shell("ls", run_path, "-o", os.devnull, prelude=prelude).stdout
    assert "gradtrace.cli.ls" in shown
    assert not [name for name in COMMANDS if name != "ls" and f"gradtrace.cli.{name}'" in shown]


def test_errors_of_ours_are_messages_and_bugs_keep_their_traceback(
    cli: Cli, command: Callable[[Callable[[], None]], None]
) -> None:
    def fail() -> None:
        error = StoreError("The disk is gone. Bring another.")
        error.add_note("It was here this morning.")
        raise error

    command(fail)
    result = cli("ls")
    assert result.exit_code == 1
    assert result.stderr == "Error: The disk is gone. Bring another.\nIt was here this morning.\n"

    def bug() -> None:
        raise ZeroDivisionError("ours")

    command(bug)
    with pytest.raises(ZeroDivisionError, match="ours"):
        cli("ls")


def test_an_interrupt_exits_with_130(cli: Cli, command: Callable[[Callable[[], None]], None]) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    command(interrupt)
    result = cli("ls")
    assert result.exit_code == 130
    assert result.stdout == ""


# The command, with a standard input that says when it is read.
WAITING = """
import io, sys

class Told(io.FileIO):
    def readinto(self, buffer):
        print("waits for names", file=sys.__stdout__, flush=True)
        return super().readinto(buffer)

sys.stdin = io.TextIOWrapper(io.BufferedReader(Told(0)))
from gradtrace.cli import main
main()
"""


def test_a_real_interrupt_exits_with_130(run_path: Path) -> None:
    command = [sys.executable, "-c", WAITING, "query", str(run_path), "-"]
    child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert child.stdout is not None
    assert child.stdout.readline() == "waits for names\n"
    child.send_signal(signal.SIGINT)
    _, stderr = child.communicate(timeout=20)
    assert child.returncode == 130
    assert "Traceback" not in stderr


def test_a_reader_that_leaves_early_is_no_error_worth_words(run_path: Path) -> None:
    code = "from gradtrace.cli import main\nmain()"
    command = [sys.executable, "-c", code, "query", str(run_path), "[eh]*", "--csv"]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert child.stdout is not None
    assert child.stderr is not None
    child.stdout.readline()
    child.stdout.close()
    stderr = child.stderr.read()
    child.stderr.close()
    assert child.wait(20) in (0, 1)
    assert stderr == b""


def test_colours_are_left_out_when_asked(shell: Shell, run_path: Path) -> None:
    environment = {**os.environ, "NO_COLOR": "1"}
    result = shell("ls", run_path, "nope", env=environment)
    assert "\x1b" not in result.stdout + result.stderr
    assert result.returncode == 1
    assert result.stdout == ""


def test_a_missing_run_says_what_to_do(cli: Cli, tmp_path: Path) -> None:
    for name in ("ls", "info", "query"):
        result = cli(name, tmp_path / "nowhere.zarr")
        assert result.exit_code == 1
        assert "There is no run at" in result.stderr
        assert result.stdout == ""


def test_unknown_commands_are_usage_errors(cli: Cli) -> None:
    assert cli("qwery").exit_code == 2
    assert main.name == "main"
    assert gradtrace.cli.NOTHING_MATCHED == 3


def test_ls_shows_each_parameter_and_how_it_was_measured(cli: Cli, run_path: Path) -> None:
    rows = {row["parameter"]: row for row in json.loads(cli("ls", run_path, "--json").stdout)}
    assert list(rows) == ["encoder.fc1.weight", "encoder.fc1.bias", "head.weight", "frozen"]
    assert rows["head.weight"]["steps"] == 21
    assert rows["encoder.fc1.bias"]["steps"] == 20
    assert rows["encoder.fc1.bias"]["groups"] == 3
    assert rows["encoder.fc1.bias"]["kinds"] == ["gradient", "activation", "adjoint"]
    assert rows["frozen"]["rung"] == "ungrouped"
    assert rows["frozen"]["steps"] == 0
    assert "11x5" in cli("ls", run_path, "head.*").stdout
    assert cli("ls", run_path, "x*").exit_code == 3
    probe = json.loads(cli("ls", run_path, "--probe", "val", "--json").stdout)
    assert [row["steps"] for row in probe] == [1, 0, 0, 0]


def test_info_tells_what_was_run_and_what_it_cost(cli: Cli, run_path: Path) -> None:
    summary = json.loads(cli("info", run_path, "--json").stdout)
    assert summary["run"]["state"] == "closed"
    assert summary["about"] == {"torch": "2.13.0", "seed": 7, "dtype": "float32"}
    assert summary["recorded"]["rows of steps"] == 21
    assert summary["recorded"]["rows of probe/val"] == 1
    assert summary["measured by rung"] == {"factored": 3, "ungrouped": 1}
    assert summary["not grouped"] == {"frozen": "the op is opaque"}
    assert summary["worst audits"]["residual"] == {
        "value": 0.5,
        "parameter": "head.weight",
        "step": 40,
        "tolerance": 0.01,
        "times above tolerance": 1,
    }
    assert "owner_residual" not in summary["worst audits"]
    assert summary["status"]["gradient"]["measured"] == 20 * 3 * 3
    assert summary["status"]["gradient"]["not finite"] == 1
    assert summary["cost in seconds"] == {
        "reduce": 10.0,
        "decompose": 5.0,
        "tracing": 15.0,
        "recorded steps": 40.0,
    }
    per_step = summary["cost per recorded step"]
    assert per_step == {"tracing": 0.75, "step": 2.0, "plain": 2.5, "period": 3.5, "added": 1.0}
    assert summary["cost as a fraction"]["of recorded steps"] == 0.375
    assert summary["cost as a fraction"]["of training time"] == 20 * 1.0 / (41 * 2.5)
    assert summary["cadence"] == {}
    shown = cli("info", run_path).stdout
    assert "residual.parameter" in shown
    assert "head.weight" in shown
    assert len(cli("info", run_path, "--csv").stdout.splitlines()) == len(shown.splitlines())
