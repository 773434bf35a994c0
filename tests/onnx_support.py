"""A small network with every kind of node worth damaging, and the surgery to damage it."""

from __future__ import annotations

import numpy as np
import onnx
import torch
from onnx import numpy_helper
from torch import nn


class Threshold(nn.Module):
    """A TLU by hand."""

    def __init__(self, channels):
        super().__init__()
        self.tau = nn.Parameter(torch.linspace(-0.3, 0.4, channels))

    def forward(self, x):
        return torch.maximum(x, self.tau.view(1, -1, 1, 1))


class Response(nn.Module):
    """FRN by hand."""

    def __init__(self, channels):
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(0.5, 1.5, channels))
        self.bias = nn.Parameter(torch.linspace(-0.5, 0.5, channels))

    def forward(self, x):
        scale = torch.rsqrt((x * x).mean((2, 3), keepdim=True) + 1e-6)
        return x * scale * self.weight.view(1, -1, 1, 1) + self.bias.view(1, -1, 1, 1)


class Block(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn1 = nn.GroupNorm(4, channels)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, groups=2)
        self.bn2 = nn.BatchNorm2d(channels)

    def forward(self, x):
        y = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(y)) + x)


class Net(nn.Module):
    """Stem with FRN and TLU, two residual blocks, a pre-activation BN, a classifier."""

    def __init__(self, classes=10):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.frn = Response(8)
        self.tlu = Threshold(8)
        self.pool = nn.MaxPool2d(2)
        self.layer1 = nn.Sequential(Block(8), Block(8))
        self.last = nn.BatchNorm2d(8)
        self.fc = nn.Linear(8, classes)

    def forward(self, x):
        x = self.pool(self.tlu(self.frn(self.stem(x))))
        x = torch.relu(self.last(self.layer1(x)))
        return self.fc(x.mean((2, 3)))


def live(model, seed=0):
    """Statistics and affine values as after training, never fresh ones."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.copy_(torch.randn(8, generator=generator) * 0.3)
                module.running_var.copy_(torch.rand(8, generator=generator) + 0.5)
            if isinstance(module, nn.BatchNorm2d | nn.GroupNorm):
                module.weight.copy_(torch.rand(8, generator=generator) + 0.5)
                module.bias.copy_(torch.randn(8, generator=generator) * 0.3)
    return model


def node_of(proto, module, op):
    """The first node of an operator inside a module."""
    for node in proto.graph.node:
        modules = next((e.value for e in node.metadata_props if e.key == "normswap.modules"), "")
        if node.op_type == op and module in modules.split(","):
            return node
    raise LookupError(f"{op} in {module}")


def tensor_of(proto, name):
    return next(t for t in proto.graph.initializer if t.name == name)


def edit_tensor(proto, name, change):
    """Replace an initializer by ``change`` of it, for this consumer and all others."""
    tensor = tensor_of(proto, name)
    array = numpy_helper.to_array(tensor).copy()
    tensor.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(change(array)), name))


def own_copy(proto, node, position):
    """Give one node its own copy of an initializer that others share; return its name."""
    old = node.input[position]
    fresh = onnx.TensorProto()
    fresh.CopyFrom(tensor_of(proto, old))
    fresh.name = f"{old}_of_{node.name}"
    proto.graph.initializer.append(fresh)
    node.input[position] = fresh.name
    return fresh.name


def attribute(node, name):
    return next(a for a in node.attribute if a.name == name)
