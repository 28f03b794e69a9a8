"""A disk that is really full: a small file system of its own, in a namespace of its own."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

CHILD = '''
import json, os, sys, time, warnings
from pathlib import Path
import torch
import gradtrace as gt
from gradtrace.store.writing import writer as writer_module

writer_module.RETRY_SECONDS = 0.05
place, freed = Path(sys.argv[1]), sys.argv[2] == "freed"
ballast = place / "ballast"

def network():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(31, 29), torch.nn.Tanh(), torch.nn.Linear(29, 3))

def train(model, steps, recorder=None):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in steps:
        x = torch.randn(8, 31, generator=torch.Generator().manual_seed(step))
        if recorder is None:
            model(x).square().mean().backward()
        else:
            with recorder.step(groups=["a", "b"] * 4):
                model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

def fill():
    """Not a byte is left."""
    with open(ballast, "wb", buffering=0) as file:
        for size in (1 << 16, 1 << 12, 1):
            try:
                while True:
                    file.write(b"x" * size)
            except OSError:
                pass

model, plain = network(), network()
recorder = gt.record(model, place / "run.zarr")
train(model, range(20), recorder)
recorder.flush()
fill()
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for step in range(20, 60):
        train(model, range(step, step + 1), recorder)
        if step == 30:
            try:
                recorder.flush()
                told = ""
            except gt.GradtraceError as error:
                told = str(error)
    during = gt.open_run(place / "run.zarr").committed["steps"]
    if freed:
        ballast.unlink()
    train(model, range(60, 80), recorder)
    if freed:
        recorder.flush()
    recorder.close()
train(plain, range(80))
run = gt.open_run(place / "run.zarr")
print(json.dumps({
    "told": told, "during": during, "steps": run.stream().steps.tolist(), "closed": run.closed,
    "measured": int((run.stream().read("0.weight", "status") == 1).all()),
    "warnings": [str(w.message) for w in caught], "failure": str(recorder.failure or ""),
    "untouched": all(torch.equal(p, q) for p, q in zip(model.parameters(), plain.parameters())),
}))
'''


@cache
def namespaces() -> bool:
    """Whether this machine lets anybody mount something for himself."""
    if shutil.which("unshare") is None:
        return False
    tried = subprocess.run([*UNSHARE, "mount -t tmpfs tmpfs /mnt"], capture_output=True)
    return tried.returncode == 0


UNSHARE = ("unshare", "--user", "--map-root-user", "--mount", "sh", "-c")


def recorded(folder: Path, how: str) -> dict[str, object]:
    """What the child says of its training on 4 MiB of disk."""
    if not namespaces():
        pytest.skip("nobody can mount a file system here; tests/store/test_writer.py has disks that fail by themselves")
    (folder / "small").mkdir()
    (folder / "child.py").write_text(CHILD)
    mount = f'mount -t tmpfs -o size=4m tmpfs "{folder}/small" && exec "$0" "$@"'
    command = [*UNSHARE, mount, sys.executable, str(folder / "child.py"), str(folder / "small"), how]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert isinstance(found, dict)
    return found


def test_recording_goes_on_when_there_is_room_again(tmp_path: Path) -> None:
    found = recorded(tmp_path, "freed")
    assert "the disk is full" in str(found["told"])
    assert found["during"] == 20, "what was committed stays readable"
    assert found["steps"] == list(range(80)), "what waited meanwhile was written"
    assert found["closed"]
    assert found["measured"]
    assert found["failure"] == ""
    assert [str(w) for w in found["warnings"] if "disk is full" in str(w)] != []  # type: ignore[attr-defined]
    assert found["untouched"]


def test_a_disk_that_stays_full_ends_the_recording_and_not_the_training(tmp_path: Path) -> None:
    found = recorded(tmp_path, "full")
    assert found["steps"] == list(range(20))
    assert not found["closed"]
    assert found["measured"]
    assert "the disk is full" in str(found["failure"])
    assert found["untouched"]
