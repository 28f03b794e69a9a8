"""ResNet-50, written plainly: bottlenecks whose middle convolution has the stride.

*Source*: He et al. 2016, arXiv:1512.03385, table 1.
"""

from __future__ import annotations

from torch import Tensor, nn

WIDENING = 4
STAGES = ((64, 3), (128, 4), (256, 6), (512, 3))  # width, blocks


def convolved(inner: int, outer: int, size: int, stride: int = 1) -> nn.Sequential:
    """A convolution with batch norm, that keeps the image's size but for the stride."""
    conv = nn.Conv2d(inner, outer, size, stride=stride, padding=size // 2, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outer))


class Bottleneck(nn.Module):
    """Three convolutions beside a shortcut."""

    def __init__(self, inner: int, width: int, stride: int) -> None:
        super().__init__()
        outer = WIDENING * width
        self.path = nn.Sequential(
            convolved(inner, width, 1), nn.ReLU(), convolved(width, width, 3, stride), nn.ReLU(),
            convolved(width, outer, 1),
        )  # fmt: skip
        same = stride == 1 and inner == outer
        self.shortcut = nn.Identity() if same else convolved(inner, outer, 1, stride)
        self.end = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.end(self.path(x) + self.shortcut(x))
        return result


def resnet50(classes: int) -> nn.Sequential:
    """The network for images of 3 channels."""
    layers: list[nn.Module] = [convolved(3, 64, 7, 2), nn.ReLU(), nn.MaxPool2d(3, stride=2, padding=1)]
    inner = 64
    for stage, (width, blocks) in enumerate(STAGES):
        for block in range(blocks):
            layers.append(Bottleneck(inner, width, stride=2 if block == 0 and stage else 1))
            inner = WIDENING * width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inner, classes))
