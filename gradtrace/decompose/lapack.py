"""LAPACK and BLAS on the CPU: numpy's, which takes about two thirds of the time of torch's where that is MKL on an
AMD processor, and half of it for a product of a matrix with its own transpose.

`one_thread` keeps them to the thread that calls, so that several can be called beside each other.
"""

from __future__ import annotations

import threading

import numpy as np
import torch
from threadpoolctl import LibController, ThreadpoolController  # type: ignore[import-untyped]
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
    """Numpy's BLAS kept to one thread a call as long as anybody wants that: the last to leave restores what was.

    The number is the process's, and whoever leaves last may be another thread than who came first. Newer threadpoolctl
    lets only the thread that set it first set it again, so the library itself is asked.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self._libraries: list[LibController] | None = None
        self._before: list[int] = []

    def __enter__(self) -> None:
        with self._lock:
            if not self._inside:
                if self._libraries is None:
                    self._libraries = ThreadpoolController().select(user_api="blas").lib_controllers
                self._before = [library.num_threads for library in self._libraries]
                self._set([1] * len(self._before))
            self._inside += 1

    def __exit__(self, *error: object) -> None:
        with self._lock:
            self._inside -= 1
            if not self._inside:
                self._set(self._before)

    def _set(self, numbers: list[int]) -> None:
        for library, number in zip(self._libraries or (), numbers, strict=True):
            getattr(library, "_real_set_num_threads", library.set_num_threads)(number)


one_thread = _Limit()
