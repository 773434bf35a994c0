"""Networks of other libraries: every batch_norm that runs is converted, or named in ``kept``.

For a machine that has them: ``pytest -m zoo tests/test_third_party.py``. A library that is not
installed skips its networks.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

import normswap
from normswap.graph import call, walk

pytestmark = [pytest.mark.zoo, pytest.mark.filterwarnings("ignore")]


def library(name: str) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip(name)


def hugging_face(config: str, model: str, **settings: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        found = library("transformers")
        return getattr(found, model)(getattr(found, config)(**settings))

    return build


def detr() -> nn.Module:
    """A backbone of DETR's own frozen BatchNorms, without a download."""
    found = library("transformers")
    module = importlib.import_module("transformers.models.detr.modeling_detr")
    backbone = found.ResNetConfig(depths=[1, 1, 1, 1], hidden_sizes=[16, 32, 64, 64])
    config = found.DetrConfig(
        use_timm_backbone=False,
        use_pretrained_backbone=False,
        backbone=None,
        backbone_config=backbone,
        encoder_layers=1,
        decoder_layers=1,
        d_model=32,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        num_queries=5,
    )
    model = found.DetrModel(config)
    assert any(isinstance(m, module.DetrFrozenBatchNorm2d) for m in model.modules())
    return model


def unet(encoder: str) -> Callable[[], nn.Module]:
    return lambda: library("segmentation_models_pytorch").Unet(
        encoder, encoder_weights=None, decoder_channels=(64, 32, 16, 16, 8)
    )


def medical(name: str, **settings: Any) -> Callable[[], nn.Module]:
    return lambda: getattr(library("monai.networks.nets"), name)(**settings)


def yolo() -> nn.Module:
    library("ultralytics")
    tasks = importlib.import_module("ultralytics.nn.tasks")
    return tasks.DetectionModel("yolov8n.yaml", verbose=False)


def adapted() -> nn.Module:
    import torchvision

    peft = library("peft")
    config = peft.LoraConfig(target_modules=["conv1", "conv2"], modules_to_save=["fc"])
    return peft.get_peft_model(torchvision.models.resnet18(), config)


def private() -> nn.Module:
    import torchvision

    opacus = library("opacus")
    model = torchvision.models.resnet18()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):  # opacus takes layers with buffers frozen only
            module.requires_grad_(requires_grad=False)
    return opacus.GradSampleModule(model, strict=False)


IMAGE = (1, 3, 64, 64)
NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "transformers DETR": (detr, IMAGE),
    "transformers RegNet": (
        hugging_face("RegNetConfig", "RegNetModel", depths=[1, 1, 2, 1]),
        IMAGE,
    ),
    "transformers MobileNetV2": (hugging_face("MobileNetV2Config", "MobileNetV2Model"), IMAGE),
    "transformers LeViT": (hugging_face("LevitConfig", "LevitModel"), (1, 3, 224, 224)),
    "transformers MobileViT": (hugging_face("MobileViTConfig", "MobileViTModel"), IMAGE),
    "smp Unet resnet18": (unet("resnet18"), IMAGE),
    "smp Unet mobilenet": (unet("timm-mobilenetv3_small_100"), IMAGE),
    "monai UNet": (
        medical(
            "UNet",
            spatial_dims=3,
            in_channels=1,
            out_channels=2,
            channels=(8, 16, 32),
            strides=(2, 2),
            norm="batch",
        ),
        (1, 1, 16, 16, 16),
    ),
    "monai SegResNet": (
        medical("SegResNet", spatial_dims=3, init_filters=8, norm="batch"),
        (1, 1, 16, 16, 16),
    ),
    "monai DenseNet": (
        medical("DenseNet121", spatial_dims=2, in_channels=1, out_channels=2),
        (1, 1, 64, 64),
    ),
    "ultralytics YOLOv8": (yolo, IMAGE),
    "peft on resnet18": (adapted, IMAGE),
    "opacus on resnet18": (private, IMAGE),
}


class Seen(TorchFunctionMode):
    """Counts by itself what normalises as a BatchNorm does: calls, and modules without one."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.functions: set[Any] = set()
        self.silent: set[nn.Module] = set()
        self._before = 0
        for module in model.modules():
            if "BatchNorm" in type(module).__name__:
                module.register_forward_pre_hook(self._enter)
                module.register_forward_hook(self._leave)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, "__name__", "") == "batch_norm":
            mean = args[1] if len(args) > 1 else (kwargs or {}).get("running_mean")
            self.functions.add(mean.data_ptr() if mean is not None else len(self.functions))
        return func(*args, **(kwargs or {}))

    def _enter(self, module, inputs):
        self._before = len(self.functions)

    def _leave(self, module, inputs, output):
        if len(self.functions) == self._before and type(module).__module__.startswith("trans"):
            self.silent.add(module)


@pytest.mark.parametrize("name", NETWORKS)
def test_every_batch_norm_is_converted_or_named(name, record_property):
    build, shape = NETWORKS[name]
    torch.manual_seed(0)
    model, x = build().eval(), torch.randn(shape)
    with torch.no_grad(), Seen(model) as seen:
        call(model, x)
    for module in model.modules():
        for hooks in (module._forward_hooks, module._forward_pre_hooks):
            for key in [k for k, hook in hooks.items() if getattr(hook, "__self__", 0) is seen]:
                del hooks[key]
    count = len(seen.functions) + len(seen.silent)
    assert count > 0
    graph = walk(model, x)
    ran = [site for site in graph if site.calls and site.mode == "eval"]
    assert len(ran) + len(graph.others) == count
    result = normswap.convert(model, "gn", example_inputs=x)
    assert len(result.replaced) + len(result.kept) == len(graph.sites) + len(graph.others)
    with torch.no_grad():
        call(result.model.eval(), x)
    record_property("seen, converted, kept", (count, len(result.replaced), len(result.kept)))


def test_opacus_trains_a_conversion_with_frozen_fallbacks():
    opacus = library("opacus")
    validators = importlib.import_module("opacus.validators")
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8 * 36, 6), nn.BatchNorm1d(6)
    )
    x = torch.randn(4, 3, 8, 8)
    plan = normswap.plan(model, "gn", example_inputs=x)
    assert any("FrozenBatchNorm(trainable=False)" in note for note in plan.notes)
    fallback = normswap.recipes.FrozenBatchNorm(trainable=False)
    result = normswap.convert(model, "gn", example_inputs=x, fallback=fallback)
    assert result.plan.counts() == {"gn": 1, "frozen": 1}
    assert validators.ModuleValidator.validate(result.model.train(), strict=False) == []
    wrapped = opacus.GradSampleModule(result.model, strict=False)
    wrapped(x).sum().backward()
    assert wrapped._module[1].weight.grad_sample.shape == (4, 8)
