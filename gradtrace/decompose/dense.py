"""Singular values of a matrix as it stands, in double precision.

What was computed in double precision is decomposed itself. What has single precision or less goes by a Gram matrix: see
`gradtrace.decompose.gram`.
"""

from __future__ import annotations

import torch
from torch import Tensor


class NotConvergedError(Exception):
    """The decomposition failed on finite values."""


def is_exact(dtype: torch.dtype) -> bool:
    """Whether half the digits of double precision are not enough for values of this dtype."""
    return dtype in (torch.float64, torch.complex128)


def double(values: Tensor) -> Tensor:
    """The same values in double precision."""
    return values.to(torch.complex128 if values.is_complex() else torch.float64)


def singular_values(matrix: Tensor) -> Tensor:
    """All singular values of (p, q), descending, in float64, min(p, q) of them; a double-precision decomposition."""
    wide = double(matrix)
    if min(wide.shape) == 1:
        return torch.linalg.vector_norm(wide)[None]
    try:
        return torch.linalg.svdvals(wide)
    except torch.linalg.LinAlgError as error:
        raise NotConvergedError(str(error)) from error


def roots(gram: Tensor) -> Tensor:
    """Singular values of a matrix, descending, from the lower half of its Gram matrix (n, n)."""
    try:
        return torch.linalg.eigvalsh(gram).clamp_min(0).sqrt().flip(0)
    except torch.linalg.LinAlgError as error:
        raise NotConvergedError(str(error)) from error
