"""Other patch sizes for a vision transformer: weights of the patch embedding and position tables, resampled.

A patch x of p x p pixels, resized by the matrix R to q x q, should be embedded as before: <w', R x> = <w, x> for every x. The least-squares answer
is w' = pinv(R^T) w (FlexiViT, Beyer et al. 2023); for q >= p it is exact, because R has full column rank then.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

Grid = tuple[int, int]


def resize_matrix(old: Grid, new: Grid) -> Tensor:
    """Bilinear resizing of a patch as a matrix [new rows * columns, old rows * columns], float64."""
    basis = torch.eye(old[0] * old[1], dtype=torch.float64).reshape(-1, 1, *old)
    resized: Tensor = F.interpolate(basis, new, mode="bilinear", align_corners=False)
    return resized.flatten(1).T.contiguous()


def resample_patches(weight: Tensor, size: Grid) -> Tensor:
    """The weight [N,C,p,p] of a patch embedding for patches of another size [N,C,*size]; differentiable."""
    old = (int(weight.shape[2]), int(weight.shape[3]))
    if old == size:
        return weight
    inverse: Tensor = torch.linalg.pinv(resize_matrix(old, size).T).to(weight.dtype)  # [new, old]
    return (weight.flatten(2) @ inverse.T).reshape(*weight.shape[:2], *size)


def resample_positions(table: Tensor, old: Grid, new: Grid, before: int = 0) -> Tensor:
    """Positions [1,T,K] of a grid of places, row by row, with `before` other tokens in front (and any others behind), for another grid.

    The grid is interpolated bicubically; other tokens, such as the class token, keep their own.
    """
    if old == new:
        return table
    places = old[0] * old[1]
    front, grid, behind = table.split([before, places, table.shape[1] - before - places], 1)
    resized = F.interpolate(grid.unflatten(1, old).permute(0, 3, 1, 2), new, mode="bicubic", align_corners=False)
    return torch.cat((front, resized.permute(0, 2, 3, 1).flatten(1, 2), behind), 1)
