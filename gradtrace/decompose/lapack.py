"""LAPACK and BLAS on the CPU: numpy's, which takes about two thirds of the time of torch's where that is MKL on an
AMD processor, and half of it for a product of a matrix with its own transpose.

`one_thread` keeps them to the thread that calls, so that several can be called beside each other.
"""

from __future__ import annotations

import threading
from typing import Any

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


def squared(rows: Tensor) -> Tensor:
    """(n, n) AᴴA of a matrix A (m, n)."""
    if rows.device.type == "cpu" and not rows.is_complex():
        known = rows.numpy()
        with np.errstate(all="ignore"):  # what is not finite is looked for in the product, and has its status
            return torch.from_numpy(known.T @ known)  # which computes half of it
    return rows.mH @ rows


class _Limit:
    """Numpy's BLAS kept to one thread a call as long as anybody wants that: the last to leave restores what was."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self._controller: ThreadpoolController | None = None
        self._limiter: Any = None

    def __enter__(self) -> None:
        with self._lock:
            if not self._inside:
                self._controller = self._controller or ThreadpoolController().select(user_api="blas")
                self._limiter = self._controller.limit(limits=1)
            self._inside += 1

    def __exit__(self, *error: object) -> None:
        with self._lock:
            self._inside -= 1
            if not self._inside:
                self._limiter.restore_original_limits()


one_thread = _Limit()
