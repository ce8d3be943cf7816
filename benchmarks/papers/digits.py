"""Generated handwritten digits, judged: by a support-vector classifier of the real ones, and by the Frechet distance on principal components."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import sqrtm
from sklearn.datasets import load_digits
from sklearn.decomposition import PCA
from sklearn.svm import SVC

from planc.compiler.papers import ROOT

MODEL = str(ROOT / "examples/masked/digits")
LEVELS, CLASS = 8, 9  # levels of grey; id of the class 0
Images = NDArray[np.float64]  # [N, 64] in 0 .. 1


@dataclass(frozen=True)
class Judge:
    """What is known of the real images."""

    svm: Any
    pca: Any
    mean: Images
    covariance: Images

    def accuracy(self, images: Images, classes: NDArray[np.int64]) -> float:
        """Share that the classifier takes for what was asked for."""
        return round(float((self.svm.predict(images) == classes).mean()), 4)

    def distance(self, images: Images) -> float:
        """Frechet distance to the real images on 20 components."""
        found = self.pca.transform(images)
        mean, covariance = found.mean(0), np.cov(found.T)
        cross = np.real(sqrtm(self.covariance @ covariance))
        return round(float(((self.mean - mean) ** 2).sum() + np.trace(self.covariance + covariance - 2 * cross)), 4)


@cache
def judge() -> Judge:
    """Learned from all images at the levels that the model knows."""
    data = load_digits()
    images = np.round(data.images / 16 * (LEVELS - 1)).reshape(len(data.images), -1) / (LEVELS - 1)
    pca = PCA(20, random_state=0).fit(images)
    found = pca.transform(images)
    return Judge(SVC(gamma="scale").fit(images, data.target), pca, found.mean(0), np.cov(found.T))


def pictures(canvases: list[list[int]]) -> Images:
    """Pixels of canvases, the class in front; what is no level counts as black."""
    ids = np.array(canvases)[:, 1:]
    return np.where(ids < LEVELS, ids, 0) / (LEVELS - 1)
