"""LAPACK and BLAS on the CPU: numpy's, which takes about two thirds of the time of torch's where that is MKL on an
AMD processor, and half of it for a product of a matrix with its own transpose.

`one_thread` keeps them to the thread that calls, so that several can be called beside each other.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from threadpoolctl import ThreadpoolController  # type: ignore[import-untyped]
from torch import Tensor


class NotConvergedError(Exception):
    """The decomposition failed on finite values."""


def eigenvalues(hermitian: Tensor) -> Tensor:
    """(..., n) eigenvalues of Hermitian matrices (..., n, n), ascending; only their lower halves are read."""
    try:
        if hermitian.device.type == "cpu":
            return torch.from_numpy(np.linalg.eigvalsh(hermitian.numpy(), UPLO="L"))
        return torch.linalg.eigvalsh(hermitian)
    except (np.linalg.LinAlgError, torch.linalg.LinAlgError) as error:
        raise NotConvergedError(str(error)) from error


def singular_values(matrices: Tensor) -> Tensor:
    """(..., min(p, q)) singular values of matrices (..., p, q), descending."""
    try:
        if matrices.device.type == "cpu":
            return torch.from_numpy(np.linalg.svd(matrices.resolve_conj().numpy(), compute_uv=False))
        return torch.linalg.svdvals(matrices)
    except (np.linalg.LinAlgError, torch.linalg.LinAlgError) as error:
        raise NotConvergedError(str(error)) from error


def squared(tall: Tensor) -> Tensor:
    """(n, n) of a real matrix (m, n) on the CPU: its transpose times itself, by a routine that knows both are one."""
    rows = tall.numpy()
    return torch.from_numpy(rows.T @ rows)


@contextmanager
def one_thread() -> Iterator[None]:
    """Keeps numpy's BLAS, in the whole process, to one thread a call."""
    with _controller().limit(limits=1):
        yield


@functools.cache
def _controller() -> ThreadpoolController:
    return ThreadpoolController().select(user_api="blas")
