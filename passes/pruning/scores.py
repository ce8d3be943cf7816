"""Scores: how much a weight or a unit is worth; the lowest are pruned first."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from planc.compiler.calibration import Gram32, Moments, Statistic
from planc.compiler.groups import Group, Site
from planc.passes.pruning.layer import Layer
from planc.runtime.registry import PlanPart

DAMP = 0.01  #: share of the mean diagonal that is added to a Hessian


class Score(PlanPart):
    """Worth of weights; of input channels: the mean of their weights; of units: the mean of the channels that read them."""

    kind: ClassVar[str] = "score"
    needs: ClassVar[frozenset[type[Statistic]]] = frozenset()  # of the input of a layer
    normalise: Literal["none", "layer"] = Field(
        default="none", description="units only: `layer` takes the mean from the channels of a group and divides by their deviation"
    )

    def weights(self, layer: Layer) -> Tensor:
        """Worth of every weight, shaped like them."""
        raise NotImplementedError

    def channels(self, layer: Layer) -> Tensor:
        """Worth of every input channel, [K]."""
        return self.weights(layer).movedim(1, 0).flatten(1).mean(1)

    def units(self, group: Group, layers: Mapping[str, Layer], params: Mapping[str, Tensor]) -> Tensor:
        """Worth of every unit of a group, [size]; `layers` by the name of their weight."""
        total = torch.zeros(group.size, dtype=torch.float64)
        for site in group.read:
            channels = self.channels(layers[site.param]).double()
            if self.normalise == "layer":
                own = channels[torch.from_numpy(site.units) >= 0]
                channels = (channels - own.mean()) / own.std(correction=0).clamp(min=1e-30)
            total += per_unit(site, channels, group.size)
        return total / len(group.read)


def per_unit(site: Site, positions: Tensor, size: int) -> Tensor:
    """Mean of a value per position [K] over the positions of each unit, [size]."""
    units = torch.from_numpy(site.units)
    own = units >= 0
    total = torch.zeros(size, dtype=torch.float64).index_add(0, units[own], positions[own].double())
    return total / torch.bincount(units[own], minlength=size)


class Magnitude(Score):
    """|w|; of a unit: the root mean square of all weights that go with it, averaged over its parameters (Zhu and Gupta 2017; DepGraph)."""

    def weights(self, layer: Layer) -> Tensor:
        """|w|."""
        return layer.weight.abs()

    def units(self, group: Group, layers: Mapping[str, Layer], params: Mapping[str, Tensor]) -> Tensor:
        """Also of what produces the unit, not of its readers alone."""
        matrices = [(s, params[s.param]) for s in group.sites if params[s.param].dim() > 1]
        norms = [per_unit(s, w.movedim(s.axis, 0).flatten(1).double().pow(2).mean(1), group.size).sqrt() for s, w in matrices]
        if self.normalise == "layer":
            norms = [(n - n.mean()) / n.std(correction=0).clamp(min=1e-30) for n in norms]
        return torch.stack(norms).mean(0)


class Wanda(Score):
    """|w| times the root mean square of its input (Sun et al. 2023)."""

    needs: ClassVar[frozenset[type[Statistic]]] = frozenset({Moments})

    def weights(self, layer: Layer) -> Tensor:
        """|w_ij| sqrt(E[x_j^2])."""
        return layer.weight.abs() * layer.along_inputs(layer.statistic(Moments).mean_square.sqrt())


class Fluctuation(Score):
    """Variance of an input times the squares of its weights: what is lost when a constant stands in for it (FLAP, An et al. 2023)."""

    needs: ClassVar[frozenset[type[Statistic]]] = frozenset({Moments})
    normalise: Literal["none", "layer"] = Field(
        default="layer", description="units only: `layer` takes the mean from the channels of a group and divides by their deviation"
    )

    def weights(self, layer: Layer) -> Tensor:
        """w_ij^2 Var[x_j]."""
        return layer.weight.pow(2) * layer.along_inputs(layer.statistic(Moments).variance)

    def channels(self, layer: Layer) -> Tensor:
        """Summed over the outputs."""
        return self.weights(layer).movedim(1, 0).flatten(1).sum(1)


class Obs(Score):
    """Squared error that removing a weight leaves after all later ones made up for it (SparseGPT, Frantar and Alistarh 2023)."""

    needs: ClassVar[frozenset[type[Statistic]]] = frozenset({Gram32})
    damp: float = Field(default=DAMP, gt=0, description="share of the mean diagonal that is added to the Hessian")

    def weights(self, layer: Layer) -> Tensor:
        """w_ij^2 / U_jj^2."""
        return layer.weight.pow(2) / layer.along_inputs(layer.inverse_factor(self.damp).diagonal().pow(2))
