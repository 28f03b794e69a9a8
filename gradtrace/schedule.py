"""Runs decompositions: those of one shape together, several at a time beside each other.

On the CPU every worker has one thread of BLAS and LAPACK to itself: decompositions of this size gain little from a
second thread, and what comes out does not depend on the number of workers. On an accelerator the device runs them,
batched by shape.
"""

from __future__ import annotations

import functools
import itertools
import os
import threading
from collections.abc import Callable, Hashable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor

from gradtrace.decompose.lapack import NotConvergedError, one_thread
from gradtrace.decompose.problem import Problem, solved

MOST_BYTES = 2**20  # of matrices that one worker stacks at a time, unless one is larger
WORTH_SHARING = 4e8  # operations: handing fewer to threads takes longer than they do
MOST_AT_ONCE = 64  # matrices in a stack

Result = Tensor | NotConvergedError
T = TypeVar("T")
R = TypeVar("R")


def solve(problems: Sequence[Problem], *, workers: int | None = None) -> dict[Problem, Result]:
    """The singular values of every problem, on the device of its matrix, or why there are none.

    workers: threads that share the work on the CPU; by default as many as torch computes with.
    """
    tasks = sorted(_tasks(problems), key=lambda task: -sum(one.flops for one in task))  # the long ones first
    if all(one.device.type == "cpu" for one in problems):
        results = beside(_run, tasks, flops=sum(one.flops for task in tasks for one in task), workers=workers)
    else:
        results = list(map(_run, tasks))
    pairs = (zip(task, found, strict=True) for task, found in zip(tasks, results, strict=True))
    return dict(itertools.chain.from_iterable(pairs))


def beside(work: Callable[[T], R], items: Sequence[T], *, flops: float, workers: int | None = None) -> list[R]:
    """What `work` makes of every item on the CPU, several at a time, each with one thread; `flops`: of all of them.

    Whether they run beside each other depends on the work alone, and what comes out does not depend on that.
    """
    workers = torch.get_num_threads() if workers is None else workers
    with on_one_thread():
        if workers < 2 or len(items) < 2 or flops < WORTH_SHARING:
            return list(map(work, items))
        results: dict[int, R] = {}
        numbers = itertools.count()

        def drain() -> None:
            while (number := next(numbers)) < len(items):
                results[number] = work(items[number])

        others = list(_asked(drain, workers - 1))
        try:
            drain()  # this thread is one of the workers
        finally:
            wait(others)
        for other in others:
            other.result()
        return [results[number] for number in range(len(items))]


def _asked(work: Callable[[], None], count: int) -> Iterator[Future[None]]:
    """So many helpers, at work; none once the interpreter shuts down, when threads take nothing on any more."""
    try:
        for _ in range(count):
            yield helpers(count, os.getpid()).submit(work)
    except RuntimeError:
        return


def _tasks(problems: Sequence[Problem]) -> Iterator[list[Problem]]:
    """The problems, each once, those of one bucket together as far as their matrices are small."""
    buckets: dict[Hashable, list[Problem]] = {}
    for one in dict.fromkeys(problems):
        buckets.setdefault(one.bucket, []).append(one)
    for bucket in buckets.values():
        step = max(1, min(MOST_AT_ONCE, MOST_BYTES // max(bucket[0].bytes, 1)))
        yield from (bucket[start : start + step] for start in range(0, len(bucket), step))


def _run(task: list[Problem]) -> list[Result]:
    try:
        return list(solved(task))
    except NotConvergedError as error:
        return [error] if len(task) == 1 else [result for one in task for result in _run([one])]


@contextmanager
def on_one_thread() -> Iterator[None]:
    """Computes with one thread of torch and one of numpy, as workers do."""
    threads = torch.get_num_threads()
    if threads > 1:
        torch.set_num_threads(1)
    try:
        with one_thread:
            yield
    finally:
        if threads > 1:
            torch.set_num_threads(threads)


def one_thread_each(count: int, name: str = "gradtrace") -> ThreadPoolExecutor:
    """So many threads, with one thread of BLAS each; whoever calls keeps its own number."""
    ready = threading.Barrier(count + 1)

    def begin() -> None:
        torch.get_num_threads()  # else the number is forgotten when torch first asks for it in this thread
        torch.set_num_threads(1)  # of this thread; but threads that begin later would take it over
        ready.wait()

    pool = ThreadPoolExecutor(count, name, initializer=begin)
    for _ in range(count):
        pool.submit(int)
    ready.wait()
    torch.set_num_threads(torch.get_num_threads())
    return pool


def idle_cores() -> int:
    """Cores that this process may use and torch does not."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(usable - torch.get_num_threads(), 0)


@functools.cache
def helpers(count: int, process: int) -> ThreadPoolExecutor:
    """Threads that share work with the one that asks. A forked process needs its own."""
    return one_thread_each(count)
