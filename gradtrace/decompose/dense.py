"""Singular values of a matrix as it stands."""

from __future__ import annotations

import torch
from torch import Tensor


class NotConvergedError(Exception):
    """The decomposition failed on finite values."""


def singular_values(matrix: Tensor) -> Tensor:
    """All singular values of (..., p, q), descending, in float64; of a p x q matrix there are min(p, q)."""
    wide = matrix.to(torch.complex128 if matrix.is_complex() else torch.float64)
    if min(wide.shape[-2:]) == 1:
        return torch.linalg.vector_norm(wide, dim=(-2, -1))[..., None]
    try:
        return torch.linalg.svdvals(wide)
    except torch.linalg.LinAlgError as error:
        raise NotConvergedError(str(error)) from error


def narrowed(rows: Tensor) -> Tensor:
    """(m, min(m, width)): rows with the same inner products, so every subset of them keeps its singular values."""
    if rows.shape[0] >= rows.shape[1]:
        return rows
    return torch.linalg.qr(rows.transpose(0, 1), mode="r").R.transpose(0, 1)


def triangle(rows: Tensor) -> Tensor:
    """R of rows = Q R: as many rows as needed, the same singular values. Rows that are few already come back as is."""
    if rows.shape[0] <= rows.shape[1]:
        return rows
    return torch.linalg.qr(rows, mode="r").R
