"""Small models that converters get wrong, each with its right answer beside it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import BatchNormAct2d, StdConv2d
from timm.layers.conv2d_same import Conv2dSame
from torch import nn


@dataclass(frozen=True)
class Answer:
    """What the walker must say of one BatchNorm.

    ``relu`` is how FRN may take the ReLU out: absorb, module, slot, call, or None if it may not.
    """

    producer: str | None
    activation: str | None = None
    act_name: str | None = None
    relu: str | None = None
    no_producer: str | None = None
    names: tuple[str, ...] = ()
    calls: int = 1
    cbn: bool | None = None  # None: exactly if there is a producer


@dataclass(frozen=True)
class Trap:
    build: Any
    answers: dict[str, Answer]
    inputs: Any = field(default_factory=lambda: torch.randn(2, 3, 8, 8))


class Alias(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.bn = nn.BatchNorm2d(4)
        self.same = self.bn
        self.listed = [self.bn]

    def forward(self, x):
        return self.same(self.conv(x))


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.bn = nn.BatchNorm2d(3)

    def forward(self, x):
        x = F.relu(self.bn(self.conv(x)))
        return F.relu(self.bn(self.conv(x)))


class Loop(nn.Module):
    """One line of code is the ReLU of several BNs."""

    def __init__(self):
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(3, 3, 3, padding=1) for _ in range(2))
        self.bns = nn.ModuleList(nn.BatchNorm2d(3) for _ in range(2))

    def forward(self, x):
        for conv, bn in zip(self.convs, self.bns, strict=True):
            x = F.relu(bn(conv(x)))
        return x


class MixedLoop(Loop):
    """The same line also runs on something that is no BN output: it has to stay."""

    def forward(self, x):
        for layer in (self.convs[0], nn.Sequential(self.convs[1], self.bns[1])):
            x = F.relu(layer(x))
        return x


class ReusedReLU(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 3, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(3)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(3, 3, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(3)

    def forward(self, x):
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += x
        return self.relu(out)


class Functional(nn.Module):
    scale: float = 1.0

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, bias=False)
        self.bn = nn.BatchNorm2d(4)

    def forward(self, x, extra: float = 0.0):
        """Has a default, an annotation, a super() and a mode-dependent line after the ReLU."""
        super().__getattribute__("scale")
        x = self.bn(self.conv(x))
        x = F.relu(
            x,
            inplace=True,
        )
        if self.training:
            x = x * 2
        return x + extra


class InPlace(Functional):
    def forward(self, x):
        x = self.bn(self.conv(x))
        torch.relu_(x)
        return x


class Method(Functional):
    def forward(self, x):
        return self.bn(self.conv(x)).relu()


class MoodyReLU(Functional):
    """In training the line of the ReLU runs on something else."""

    def forward(self, x):
        x = self.conv(x) if self.training else self.bn(self.conv(x))
        return F.relu(x)


class Helper(Functional):
    def forward(self, x):
        return apart(self.bn(self.conv(x)))


def apart(x):
    return F.relu(x)


class TwoUses(Functional):
    def forward(self, x):
        x = self.bn(self.conv(x))
        return F.relu(x) + x.mean()


class BeforeInPlace(Functional):
    """The conv's output is changed in place before the BN sees it."""

    def forward(self, x):
        x = self.conv(x)
        x.add_(1)
        return F.silu(self.bn(x))


class Concat(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.bn = nn.BatchNorm2d(6)
        self.relu = nn.ReLU()

    def forward(self, x):
        return self.relu(self.bn(torch.cat([x, self.conv(x)], 1)))


class Tokens(nn.Module):
    """LeViT's way: (B, T, C) flattened to (B*T, C) in front of a BatchNorm1d."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(5, 7)
        self.bn = nn.BatchNorm1d(7)

    def forward(self, x):
        x = self.linear(x)
        return self.bn(x.flatten(0, 1)).reshape_as(x)


class Transposed(Tokens):
    def forward(self, x):
        return self.bn(self.linear(x).transpose(1, 2))


class WrongAxis(nn.Module):
    """The view moves other axes into the channels: no producer."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)
        self.bn = nn.BatchNorm2d(16)

    def forward(self, x):
        return self.bn(self.conv(x).reshape(-1, 16, 4, 4))


class Uncalled(Functional):
    def __init__(self):
        super().__init__()
        self.never = nn.BatchNorm2d(4)


class TrainingHead(Functional):
    def __init__(self):
        super().__init__()
        self.head = nn.Sequential(nn.Conv2d(4, 2, 1), nn.BatchNorm2d(2), nn.ReLU())

    def forward(self, x):
        x = self.bn(self.conv(x))
        return (x, self.head(x)) if self.training else x


class WeightNormaliser(nn.Module):
    """A functional batch_norm on weights is no site; its conv cannot feed CBN."""

    def __init__(self):
        super().__init__()
        self.conv = StdConv2d(3, 4, 3)
        self.bn = nn.BatchNorm2d(4)

    def forward(self, x):
        return self.bn(self.conv(x))


class SharedConv(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)
        self.a = nn.BatchNorm2d(4)
        self.b = nn.BatchNorm2d(4)

    def forward(self, x):
        x = self.conv(x)
        return self.a(x) + self.b(x)


class CallsAnything(nn.Module):
    """One expression runs a convolution, a BN and a ReLU in turn."""

    def __init__(self):
        super().__init__()
        conv, bn = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)
        self.relu = nn.ReLU()
        self.parts = nn.ModuleList((conv, bn, self.relu))

    def forward(self, x):
        for part in self.parts:
            x = part(x)
        return self.relu(x + 1)


class OneOfTwo(Functional):
    """The same expression is a ReLU at first and a sigmoid later."""

    def forward(self, x):
        x = self.bn(self.conv(x))
        for index in range(2):
            x = (F.relu if index == 0 else torch.sigmoid)(x)
        return x


class ByKeyword(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.bn = nn.BatchNorm2d(3)

    def forward(self, x):
        x = self.bn(input=self.conv(input=x))
        return F.relu(x) + self.conv(input=x)


class Private(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.__bn = nn.BatchNorm2d(4)

    def forward(self, x):
        return F.relu(self.__bn(self.conv(x)))


class DirectForward(Functional):
    def forward(self, x):
        x = self.conv(x)
        return F.relu(self.bn(x)) + self.bn.forward(2 * x)


class NoiseInTraining(Functional):
    def forward(self, x):
        x = self.conv(x)
        if self.training:
            x = x * (1 + torch.ones_like(x))
        return F.silu(self.bn(x))


class Named(Functional):
    """An output that pytrees do not know still uses the BN's output."""

    class Output:
        def __init__(self, feature, result):
            self.feature, self.result = feature, result

        def sum(self):
            return self.feature.sum() + self.result.sum()

    def forward(self, x):
        x = self.bn(self.conv(x))
        return Named.Output(x, F.relu(x))


class Nested(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.bn = nn.BatchNorm2d(3)
        self.stages = [(self.conv, {"norm": self.bn})]

    def forward(self, x):
        for conv, found in self.stages:
            x = F.relu(found["norm"](conv(x)))
        return x


class NormInConv(nn.Conv2d):
    """detectron2's habit: a convolution that carries its norm."""

    def __init__(self):
        super().__init__(3, 4, 3)
        self.norm = nn.BatchNorm2d(4)

    def forward(self, x):
        return self.norm(super().forward(x))


class NormInLinear(nn.Linear):
    def __init__(self):
        super().__init__(5, 7)
        self.norm = nn.BatchNorm1d(7)

    def forward(self, x):
        return F.silu(self.norm(F.linear(x, self.weight, self.bias)))


class NormAfterReLU(nn.ReLU):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(3)

    def forward(self, x):
        return self.norm(super().forward(x))


class NormBeforePReLU(nn.PReLU):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(4)

    def forward(self, x):
        return super().forward(self.norm(x))


class GLU(nn.Module):
    """Named like an activation, and holds a convolution and a norm."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 1)
        self.norm = nn.BatchNorm2d(4)

    def forward(self, x):
        return x * self.norm(self.conv(x)).sigmoid()


class ReLU(nn.Module):
    """Named like torch's, and is none."""

    def forward(self, x):
        return F.leaky_relu(x, 0.3)


class TwoInOne(nn.Conv2d):
    """A convolution in a convolution: the inner one makes what comes out."""

    def __init__(self):
        super().__init__(3, 4, 1)
        self.second = nn.Conv2d(4, 4, 1)

    def forward(self, x):
        return self.second(super().forward(x).tanh())


class ConvThenReLU(nn.Conv2d):
    def forward(self, x):
        return F.relu(super().forward(x))


class ScaledOutside(nn.Conv2d):
    """The norm sees twice what the convolution makes: CBN cannot follow."""

    def __init__(self):
        super().__init__(3, 4, 3)
        self.norm = nn.BatchNorm2d(4)

    def forward(self, x):
        return self.norm(super().forward(x) * 2)


class NormInPreHook(nn.Sequential):
    def __init__(self):
        super().__init__(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 1))
        self[1].register_forward_pre_hook(self.first)

    def first(self, conv, inputs):
        return (self[0](*inputs),)

    def forward(self, x):
        return self[1](x)


def hooked_relu():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
    model[2].register_forward_hook(doubled)
    return model


def doubled(module, inputs, output):
    return output * 2


def shared_slot():
    relu = nn.ReLU()
    block = (nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3), relu)
    tail = (nn.Conv2d(3, 3, 3, padding=1), relu)
    return nn.Sequential(*block, *tail)


def fused(act=nn.ReLU, **kwargs):
    def build():
        bn = BatchNormAct2d(4, act_layer=act, **kwargs)
        return nn.Sequential(nn.Conv2d(3, 4, 3), bn)

    return build


def sequential(conv, bn, *tail):
    return lambda: nn.Sequential(conv(), bn(), *(t() for t in tail))


TRAPS: dict[str, Trap] = {
    "root": Trap(lambda: nn.BatchNorm2d(3), {"": Answer(None, no_producer="input")}),
    "alias": Trap(Alias, {"bn": Answer("conv", names=("bn", "same"))}),
    "tied": Trap(Tied, {"bn": Answer("conv", "relu", None, None, calls=2, cbn=False)}),
    "loop": Trap(
        Loop,
        {f"bns.{i}": Answer(f"convs.{i}", "relu", None, "call") for i in (0, 1)},
    ),
    "mixed loop": Trap(
        MixedLoop,
        {
            "bns.1": Answer("convs.1", "relu", None, None),
            "bns.0": Answer(None, no_producer="never ran", calls=0),
        },
    ),
    "reused relu": Trap(
        ReusedReLU,
        {"bn1": Answer("conv1", "relu", "relu", "call"), "bn2": Answer("conv2")},
    ),
    "functional relu": Trap(Functional, {"bn": Answer("conv", "relu", None, "call")}),
    "in-place relu": Trap(InPlace, {"bn": Answer("conv", "relu", None, "call")}),
    "method relu": Trap(Method, {"bn": Answer("conv", "relu", None, "call")}),
    "moody relu": Trap(MoodyReLU, {"bn": Answer("conv", "relu", None, None)}),
    "helper": Trap(Helper, {"bn": Answer("conv", "relu", None, None)}),
    "two uses": Trap(TwoUses, {"bn": Answer("conv")}),
    "changed before": Trap(BeforeInPlace, {"bn": Answer(None, "silu", no_producer="add")}),
    "concat": Trap(Concat, {"bn": Answer(None, "relu", "relu", "module", no_producer="cat")}),
    "fused relu": Trap(fused(), {"1": Answer("0", "relu", "1.act", "absorb")}),
    "fused silu": Trap(fused(nn.SiLU), {"1": Answer("0", "silu", "1.act")}),
    "fused none": Trap(fused(apply_act=False), {"1": Answer("0")}),
    "fused drop": Trap(fused(drop_layer=nn.Dropout), {"1": Answer("0", "relu", "1.act", "absorb")}),
    "shared slot": Trap(shared_slot, {"1": Answer("0", "relu", "2", "slot")}),
    "relu6": Trap(
        sequential(lambda: nn.Conv2d(3, 4, 3), lambda: nn.BatchNorm2d(4), nn.ReLU6),
        {"1": Answer("0", "relu6", "2")},
    ),
    "leaky": Trap(
        sequential(lambda: nn.Conv2d(3, 4, 3), lambda: nn.BatchNorm2d(4), nn.LeakyReLU),
        {"1": Answer("0", "leaky_relu", "2")},
    ),
    "depthwise": Trap(
        sequential(lambda: nn.Conv2d(3, 6, 3, groups=3), lambda: nn.BatchNorm2d(6), nn.Hardswish),
        {"1": Answer("0", "hardswish", "2")},
    ),
    "conv transpose": Trap(
        sequential(lambda: nn.ConvTranspose2d(3, 4, 2), lambda: nn.BatchNorm2d(4), nn.ReLU),
        {"1": Answer("0", "relu", "2", "module")},
    ),
    "conv1d": Trap(
        sequential(lambda: nn.Conv1d(3, 4, 3), lambda: nn.BatchNorm1d(4), nn.ReLU),
        {"1": Answer("0", "relu", "2", "module")},
        torch.randn(2, 3, 16),
    ),
    "conv3d": Trap(
        sequential(lambda: nn.Conv3d(3, 4, 3), lambda: nn.BatchNorm3d(4), nn.ReLU),
        {"1": Answer("0", "relu", "2", "module")},
        torch.randn(2, 3, 6, 6, 6),
    ),
    "linear": Trap(
        sequential(lambda: nn.Linear(5, 7), lambda: nn.BatchNorm1d(7), nn.ReLU),
        {"1": Answer("0", "relu", "2", "module")},
        torch.randn(3, 5),
    ),
    "tokens": Trap(Tokens, {"bn": Answer("linear")}, torch.randn(2, 6, 5)),
    "transposed tokens": Trap(Transposed, {"bn": Answer("linear")}, torch.randn(2, 6, 5)),
    "wrong axis": Trap(
        WrongAxis,
        {"bn": Answer(None, no_producer="a view that does not keep the channel axis")},
    ),
    "same padding": Trap(
        sequential(lambda: Conv2dSame(3, 4, 3, stride=2), lambda: nn.BatchNorm2d(4)),
        {"1": Answer("0")},
    ),
    "uncalled": Trap(
        Uncalled,
        {
            "bn": Answer("conv", "relu", None, "call"),
            "never": Answer(None, no_producer="never ran", calls=0),
        },
    ),
    "training head": Trap(
        TrainingHead,
        {
            "bn": Answer("conv"),
            "head.1": Answer("head.0", "relu", "head.2", "module"),
        },
    ),
    "weight normaliser": Trap(WeightNormaliser, {"bn": Answer("conv", cbn=False)}),
    "shared conv": Trap(
        SharedConv, {"a": Answer("conv", cbn=False), "b": Answer("conv", cbn=False)}
    ),
    "calls anything": Trap(CallsAnything, {"parts.1": Answer("parts.0", "relu", "relu")}),
    "one of two": Trap(OneOfTwo, {"bn": Answer("conv", "relu")}),
    "by keyword": Trap(ByKeyword, {"bn": Answer("conv", cbn=False)}),
    "private names": Trap(Private, {"_Private__bn": Answer("conv", "relu")}),
    "direct forward": Trap(
        DirectForward,
        {
            "bn": Answer(
                None,
                "relu",
                no_producer="its tensors are used by a batch_norm call outside of the module",
            )
        },
    ),
    "noise in training": Trap(
        NoiseInTraining, {"bn": Answer(None, "silu", no_producer="calls disagree")}
    ),
    "dropout before": Trap(
        sequential(lambda: nn.Conv2d(3, 4, 3), nn.Dropout, lambda: nn.BatchNorm2d(4)),
        {"2": Answer(None, no_producer="dropout")},
    ),
    "nested containers": Trap(Nested, {"bn": Answer("conv", "relu", None, "call")}),
    "hooked relu": Trap(hooked_relu, {"1": Answer("0", "relu", "2")}),
    "norm in conv": Trap(
        lambda: nn.Sequential(NormInConv(), nn.ReLU()),
        {"0.norm": Answer("0", "relu", "1", "module")},
    ),
    "norm in linear": Trap(
        sequential(NormInLinear, nn.ReLU), {"0.norm": Answer("0", "silu")}, torch.randn(3, 5)
    ),
    "norm after relu": Trap(
        sequential(NormAfterReLU, nn.Tanh),
        {"0.norm": Answer(None, "tanh", "1", no_producer="relu")},
    ),
    "norm before prelu": Trap(
        sequential(lambda: nn.Conv2d(3, 4, 3), NormBeforePReLU),
        {"1.norm": Answer("0", "prelu")},
    ),
    "named GLU": Trap(
        sequential(lambda: nn.Conv2d(3, 4, 3), GLU), {"1.norm": Answer("1.conv", "sigmoid")}
    ),
    "named ReLU": Trap(
        sequential(lambda: nn.Conv2d(3, 4, 3), lambda: nn.BatchNorm2d(4), ReLU),
        {"1": Answer("0", "leaky_relu")},
    ),
    "conv in conv": Trap(
        sequential(TwoInOne, lambda: nn.BatchNorm2d(4)), {"1": Answer("0.second")}
    ),
    "conv then relu": Trap(
        sequential(lambda: ConvThenReLU(3, 4, 3), lambda: nn.BatchNorm2d(4)),
        {"1": Answer(None, no_producer="relu")},
    ),
    "scaled outside": Trap(ScaledOutside, {"norm": Answer(None, no_producer="mul")}),
    "norm in a pre-hook": Trap(NormInPreHook, {"0": Answer(None, no_producer="input")}),
    "no affine": Trap(
        sequential(lambda: nn.Conv2d(3, 4, 3), lambda: nn.BatchNorm2d(4, affine=False)),
        {"1": Answer("0")},
    ),
}


def randomise(model, seed=0):
    """Give every norm statistics and affine values that cancel nothing by luck."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(tensor, low, high):
        values = torch.rand(tensor.shape, generator=generator, dtype=torch.float64)
        tensor.data.copy_(values * (high - low) + low)

    for module in model.modules():
        for name, low, high in (
            ("running_mean", -0.5, 0.5),
            ("running_var", 0.5, 2.0),
            ("weight", 0.5, 1.5),
            ("bias", -0.5, 0.5),
        ):
            tensor = getattr(module, name, None)
            if tensor is not None and getattr(module, "running_var", None) is not None:
                uniform(tensor, low, high)
    return model


def built(name, seed=0):
    torch.manual_seed(seed)
    return randomise(TRAPS[name].build(), seed).eval()
