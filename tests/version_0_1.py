"""The small network behind the fixtures that version 0.1 wrote; `tests/fixtures/README.md`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

TARGETS = {"stem.1": "gn", "block.*": "frn", "head.1": "cbn"}


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        return x + F.relu(self.bn(self.conv(x)))


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.block = nn.Sequential(Block(), nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8), nn.ReLU())
        self.head = nn.Sequential(nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
        self.fc = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.head(self.block(self.stem(x))).mean((2, 3)))


def network() -> nn.Module:
    """With weights and statistics that no constructor makes."""
    torch.manual_seed(0)
    model = Network().eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.5)
            nn.init.normal_(module.running_mean, std=0.5)
            nn.init.uniform_(module.running_var, 0.5, 2)
    return model


def images() -> Tensor:
    return torch.linspace(-2, 2, 2 * 3 * 12 * 12).sin().reshape(2, 3, 12, 12)
