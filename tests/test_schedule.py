"""Decompositions run together: what comes out does not depend on how they are shared out."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch
from threadpoolctl import threadpool_info, threadpool_limits  # type: ignore[import-untyped]

import gradtrace.decompose.lapack
import gradtrace.schedule
from gradtrace.decompose.gram import rounded_problem
from gradtrace.decompose.lapack import NotConvergedError, one_thread
from gradtrace.decompose.problem import Problem, summed_problem
from gradtrace.schedule import beside, solve

SIZES = [(7, 5), (5, 7), (7, 5), (130, 90), (90, 130), (1, 9), (300, 280), (300, 280)]


def problems(dtype: torch.dtype) -> list[Problem]:
    """Of several shapes, some of them alike."""
    generator = torch.Generator().manual_seed(0)
    matrices = [torch.randn(size, generator=generator, dtype=dtype) for size in SIZES]
    pose = summed_problem if dtype == torch.float64 else rounded_problem
    return [pose([matrix, 2 * matrix]) for matrix in matrices]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_number_of_workers_changes_no_bit(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gradtrace.schedule, "WORTH_SHARING", 0)
    posed = problems(dtype)
    results = [solve(posed, workers=workers) for workers in (1, 2, 3, 5)]
    for one in posed:
        first, *others = (torch.as_tensor(result[one]) for result in results)
        assert len(first) == min(one.sides)
        assert all(torch.equal(first, other) for other in others)


def test_what_is_worth_sharing_runs_on_several_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gradtrace.schedule, "WORTH_SHARING", 0)
    met = threading.Barrier(3, timeout=30)  # none goes on before three have come

    def work(item: int) -> tuple[int, int]:
        met.wait()
        return item, torch.get_num_threads()

    assert beside(work, [1, 2, 3], flops=1.0, workers=3) == [(1, 1), (2, 1), (3, 1)]


def test_the_number_of_threads_is_afterwards_what_it_was() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        beside(float, [1, 2, 3], flops=1e12, workers=3)
        assert torch.get_num_threads() == 2
        found: list[int] = []
        thread = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
        thread.start()
        thread.join()
        assert found == [2], "nor do threads that begin later have fewer"
    finally:
        torch.set_num_threads(before)


def blas_threads() -> set[int]:
    return {library["num_threads"] for library in threadpool_info() if library["user_api"] == "blas"}


def test_whichever_thread_comes_first_or_leaves_last() -> None:
    """The number is the process's, not a thread's."""

    def visit(found: list[set[int]]) -> None:
        with one_thread:
            came.set()
            found.append(blas_threads())
            assert go_on.wait(30)
            found.append(blas_threads())

    with threadpool_limits(limits=2, user_api="blas"):
        for main_comes_first in (True, False):
            came, go_on, found = threading.Event(), threading.Event(), list[set[int]]()
            other = threading.Thread(target=visit, args=(found,))
            if main_comes_first:
                with one_thread:
                    other.start()
                    assert came.wait(30)
            else:
                other.start()
                assert came.wait(30)
                with one_thread:
                    assert blas_threads() == {1}
            assert blas_threads() == {1}, "the other is still inside"
            go_on.set()
            other.join()
            assert found == [{1}, {1}]
            assert blas_threads() == {2}


def test_numpys_threads_are_what_they_were_when_the_last_has_left() -> None:
    """Two who train at once come and go in any order."""
    with threadpool_limits(limits=2, user_api="blas"):
        one_thread.__enter__()
        one_thread.__enter__()
        assert blas_threads() == {1}
        one_thread.__exit__(None, None, None)
        assert blas_threads() == {1}, "the other is still there"
        one_thread.__exit__(None, None, None)
        assert blas_threads() == {2}


TRAINED = """
import hashlib, sys, tempfile
import torch
import gradtrace as gt

torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(300, 400), torch.nn.Tanh(), torch.nn.Linear(400, 300))
optimizer, x = torch.optim.Adam(model.parameters()), torch.randn(1200, 300)
groups = ["a" if n % 3 else "b" for n in range(len(x))]

def train(step):
    for _ in range(5):
        with step(groups=groups):
            (model(x) - x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

if sys.argv[1] == "recorded":
    with tempfile.TemporaryDirectory() as folder, gt.record(model, folder + "/run.zarr") as recorder:
        train(recorder.step)
else:
    from contextlib import nullcontext
    train(lambda groups: nullcontext())
weights = b"".join(p.detach().numpy().tobytes() for p in model.parameters())
print(torch.get_num_threads(), hashlib.sha256(weights).hexdigest())
"""


def test_training_on_several_threads_is_bitwise_what_it_would_be_alone() -> None:
    """In processes of their own: how many threads torch was told to use is a state of the process."""
    environment = {**os.environ, "OMP_NUM_THREADS": "2"}
    alone, recorded = (
        subprocess.run(
            [sys.executable, "-W", "ignore", "-c", TRAINED, how],
            env=environment,
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for how in ("alone", "recorded")
    )
    assert alone.startswith("2 ")
    assert recorded == alone


def test_an_error_of_one_item_is_raised_when_all_have_ended() -> None:
    def work(item: int) -> int:
        if item == 1:
            raise ValueError("the second")
        return item

    with pytest.raises(ValueError, match="the second"):
        beside(work, [0, 1, 2, 3], flops=1e12, workers=2)
    assert beside(lambda item: item + 1, [0, 1], flops=1e12, workers=2) == [1, 2], "the workers go on"


def test_one_that_does_not_converge_takes_none_of_its_bucket_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    posed = [summed_problem([torch.full((4, 3), float(n + 1), dtype=torch.float64)]) for n in range(3)]

    def failing(matrices: np.ndarray, compute_uv: bool) -> np.ndarray:
        if (matrices == 2).any():
            raise np.linalg.LinAlgError("SVD did not converge")
        return np.asarray(svd(matrices, compute_uv=compute_uv))

    svd = np.linalg.svd
    monkeypatch.setattr(gradtrace.decompose.lapack.np.linalg, "svd", failing)
    solved = solve(posed)
    assert isinstance(solved[posed[1]], NotConvergedError)
    for place in (0, 2):
        assert torch.allclose(
            torch.as_tensor(solved[posed[place]])[0], torch.tensor(12.0).double().sqrt() * (place + 1)
        )


def test_a_problem_that_two_parameters_share_is_solved_once() -> None:
    built = []

    def build() -> torch.Tensor:
        built.append(1)
        return torch.eye(3, dtype=torch.float64)

    one = Problem("matrix", (3, 3), torch.float64, torch.device("cpu"), build)
    assert len(solve([one, one])) == 1
    assert built == [1]


def _in_child(results: multiprocessing.Queue) -> None:  # type: ignore[type-arg]
    results.put(beside(float, [1, 2], flops=1e12, workers=2))


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_process_has_workers_of_its_own() -> None:
    beside(float, [1, 2], flops=1e12, workers=2)
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    child = context.Process(target=_in_child, args=(results,))
    child.start()
    try:
        assert results.get(timeout=60) == [1.0, 2.0]
    finally:
        child.join(60)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_gpu_finds_the_same_singular_values(dtype: torch.dtype) -> None:
    here = problems(dtype)
    pose = summed_problem if dtype == torch.float64 else rounded_problem
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randn(size, generator=generator, dtype=dtype).cuda() for size in SIZES]
    there = [pose([matrix, 2 * matrix]) for matrix in drawn]
    ours, expected = solve(there), solve(here)
    for one, other in zip(there, here, strict=True):
        sigma, reference = torch.as_tensor(ours[one]), torch.as_tensor(expected[other])
        assert sigma.device.type == "cuda"
        assert torch.allclose(sigma.cpu(), reference, rtol=1e-6 if dtype == torch.float32 else 1e-11)
