"""The eval form of every layer in TorchScript, and every layer as a node of torch.fx."""

import warnings

import pytest
import torch
from timm.layers import BatchNormAct2d, freeze_batch_norm_2d
from torch import fx, nn
from torchvision.models.feature_extraction import create_feature_extractor

import normswap
from normswap import layers
from normswap.layers.fused import fused_classes
from normswap.layers.sync_batch_norm_act import SyncBatchNormAct
from normswap.targets import TARGETS

RANKS = {"1d": 1, "2d": 2, "3d": 3}
KINDS = {name[:-2] for name in layers.__all__ if name.endswith(tuple(RANKS))}
KINDS = sorted(kind for kind in KINDS if not kind.endswith(("Act", "Conv")))
PLAIN = [getattr(layers, kind + rank) for kind in KINDS for rank in RANKS]


def made(cls):
    torch.manual_seed(0)
    layer = cls(2, 4) if issubclass(cls, nn.GroupNorm) else cls(4)
    for tensor in (*layer.parameters(), *layer.buffers()):
        if tensor.is_floating_point():
            nn.init.uniform_(tensor, 0.5, 2.0)
    rank = next((r for name, r in RANKS.items() if name in cls.__name__), 2)
    return layer.eval(), torch.randn(2, 4, *[5] * rank)


def scripted(model):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*torch.jit.script.* is deprecated")
        return torch.jit.script(model)


@pytest.mark.parametrize(
    "cls", [*PLAIN, layers.ThresholdedLinearUnit, *fused_classes.values()], ids=lambda c: c.__name__
)
def test_every_layer_is_scripted_and_traced(cls):
    layer, x = made(cls)
    torch.testing.assert_close(scripted(layer)(x), layer(x))
    fx.symbolic_trace(nn.Sequential(layer).train())
    model = nn.Sequential(layer).eval()
    torch.testing.assert_close(fx.symbolic_trace(model)(x), model(x))


@pytest.mark.parametrize("rank", RANKS.values(), ids=list(RANKS))
@pytest.mark.parametrize(
    "settings", [{}, {"bias": False, "padding": 1, "padding_mode": "circular"}]
)
def test_every_convolution_is_scripted_and_traced(rank, settings):
    torch.manual_seed(0)
    conv = getattr(layers, f"WeightStandardisedConv{rank}d")(3, 4, 3, **settings).eval()
    x = torch.randn(2, 3, *[5] * rank)
    torch.testing.assert_close(scripted(conv)(x), conv(x))
    model = nn.Sequential(conv)
    traced = fx.symbolic_trace(model)
    assert [node.op for node in traced.graph.nodes] == ["placeholder", "call_module", "output"]
    torch.testing.assert_close(traced(x), model(x))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.bn = nn.BatchNorm2d(4)
        self.relu = nn.ReLU()
        self.conv2 = nn.Conv2d(4, 4, 3)
        self.fused = BatchNormAct2d(4)
        self.head = nn.Conv2d(4, 2, 1)
        self.last = nn.BatchNorm2d(2)

    def forward(self, x):
        x = self.fused(self.conv2(self.relu(self.bn(self.conv(x)))))
        return self.last(self.head(x.mean((2, 3), keepdim=True)))


@pytest.mark.parametrize("target", [target for target in TARGETS if target != "bn"])
def test_converted_models_are_scripted_and_traced(target):
    torch.manual_seed(0)
    x = torch.randn(2, 3, 9, 9)
    # a 1x1 map at the end: a frozen fallback must not spoil the others
    found = normswap.convert(Net().eval(), target, example_inputs=x)
    model = found.model.eval()
    expected = model(x)
    torch.testing.assert_close(scripted(model)(x), expected)
    torch.testing.assert_close(fx.symbolic_trace(model)(x), expected)
    taken = create_feature_extractor(model, ["conv2", "head"])
    assert list(taken(x)) == ["conv2", "head"]
    torch.testing.assert_close(taken(x)["head"].shape, torch.Size([2, 2, 1, 1]))


def test_timms_tools_take_the_fused_syncbn_for_their_own():
    torch.manual_seed(0)
    x = torch.randn(2, 3, 9, 9)
    model = normswap.convert(Net().eval(), "syncbn", example_inputs=x).model.eval()
    assert isinstance(model.fused, SyncBatchNormAct)
    expected = model(x)
    torch.testing.assert_close(freeze_batch_norm_2d(model)(x), expected)


def test_a_traced_model_trains_and_changes_its_mode():
    torch.manual_seed(0)
    x = torch.randn(4, 3, 9, 9)
    model = normswap.convert(Net(), "cbn", example_inputs=x).model.train()
    traced = fx.symbolic_trace(model)
    before = model.bn.running_mean.clone()
    traced(x).sum().backward()
    assert not torch.equal(model.bn.running_mean, before)
    assert model.bn.iteration == 1
    torch.testing.assert_close(traced.eval()(x), model.eval()(x))


def test_a_scripted_layer_refuses_to_train():
    layer, x = made(layers.BatchRenorm2d)
    script = scripted(layer)
    script.train()
    with pytest.raises(torch.jit.Error, match="eval form only"):
        script(x)


def test_a_scripted_model_survives_its_file(tmp_path):
    layer, x = made(layers.FilterResponseNorm2d)
    scripted(layer).save(str(tmp_path / "layer.pt"))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*torch.jit.load.* is deprecated")
        again = torch.jit.load(str(tmp_path / "layer.pt"))
    torch.testing.assert_close(again(x), layer(x))
