"""Attention over segments of different formats, merged by their log-sum-exp (papers/A4 section 4): the meaning that kernels are tested against.

Letters: G key/value heads, M query rows of a key/value head (rows of the pass times the query heads that share it), T keys of a segment, D width.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from planc.runtime.engine import Floats


class Partial(NamedTuple):
    """Attention over one segment: `mixed` [G,M,Dv] is the weighted mean of its values, for weights exp(score - `peak`) that sum to `total`."""

    mixed: Floats
    peak: Floats  # [G,M], minus infinity where the segment shows nothing
    total: Floats  # [G,M]


def attend(scores: Floats, values: Floats, hidden: NDArray[np.bool_] | None = None) -> Partial:
    """One segment: scaled scores [G,M,T] and values [G,T,Dv]; `hidden` [M,T] marks keys that a row does not see."""
    if hidden is not None:
        scores = np.where(hidden, -np.inf, scores)
    peak = scores.max(-1, initial=-np.inf)
    with np.errstate(invalid="ignore"):  # -inf - -inf where everything is hidden
        weights = np.nan_to_num(np.exp(scores - peak[..., None]), nan=0.0)
    total = weights.sum(-1)
    return Partial(weights @ values / np.maximum(total, np.finfo(np.float32).tiny)[..., None], peak, total)


def merge(partials: Iterable[Partial]) -> Floats:
    """What attention over all segments at once gives, [G,M,Dv]."""
    parts = list(partials)
    peak = np.max([part.peak for part in parts], axis=0)
    shares = []
    for part in parts:
        with np.errstate(invalid="ignore"):
            shares.append(part.total * np.nan_to_num(np.exp(part.peak - peak), nan=0.0))
    whole = np.sum(shares, axis=0)
    mixed: Floats = np.sum([share[..., None] * part.mixed for share, part in zip(shares, parts, strict=True)], axis=0) / whole[..., None]
    return mixed


def grouped(queries: Floats, heads: int) -> Floats:
    """Queries [R,H,D] by the key/value head that they read, [G, R*H/G, D]: row by row, then query head by query head."""
    rows, count, width = queries.shape
    by_head = queries.reshape(rows, heads, count // heads, width).transpose(1, 0, 2, 3)
    return by_head.reshape(heads, -1, width)
