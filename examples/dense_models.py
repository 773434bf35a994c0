"""Segmentation and detection on any timm backbone: the factories that ``python:`` specs name.

    normswap finetune python:dense_models:unet --data FOLDER -o out          # from this folder
    normswap finetune python:dense_models:retinanet --data FOLDER -o out
    normswap convert python:dense_models:faster_rcnn --to gn -o gn

A factory takes what it names of ``num_classes``, ``pretrained``, ``image_size``. A detector says
``task = "detection"``, so that it is given lists of images; a segmentation network gives its logits
as ``out``. ``num_classes`` counts the background, which is class 0.
"""

from __future__ import annotations

from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool, LastLevelP6P7

BACKBONE = "tf_efficientnet_lite0"


class Pyramid(nn.Module):
    """A timm backbone under torchvision's feature pyramid.

    Args:
        name: of the backbone, one that ``features_only`` knows.
        levels: which of its maps, counted from stride 2.
        pretrained: with timm's weights.
        more: what adds coarser maps.
    """

    def __init__(
        self,
        name: str,
        levels: tuple[int, ...],
        *,
        pretrained: bool,
        more: Any,
        out_channels: int = 128,
    ) -> None:
        super().__init__()
        self.body = timm.create_model(
            name, pretrained=pretrained, features_only=True, out_indices=levels
        )
        widths = self.body.feature_info.channels()
        self.neck = FeaturePyramidNetwork(widths, out_channels, more)
        self.out_channels = out_channels

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Maps by name, the finest first."""
        maps = {str(at): found for at, found in enumerate(self.body(x))}
        pyramid: dict[str, Tensor] = self.neck(maps)
        return pyramid


def _seen_by(name: str, image_size: int | tuple[int, int]) -> dict[str, Any]:
    """How torchvision's detectors resize and normalise for a backbone."""
    wanted = timm.get_pretrained_cfg(name)
    edges = (image_size,) if isinstance(image_size, int) else image_size
    return {
        "min_size": min(edges),
        "max_size": max(edges),
        "image_mean": list(wanted.mean),
        "image_std": list(wanted.std),
    }


def retinanet(
    num_classes: int = 91,
    pretrained: bool = True,
    image_size: int | tuple[int, int] = 512,
    backbone: str = BACKBONE,
    **options: Any,
) -> nn.Module:
    """Torchvision's RetinaNet on maps of stride 8 to 128."""
    extra = LastLevelP6P7(128, 128)
    body = Pyramid(backbone, (2, 3, 4), pretrained=pretrained, more=extra)
    sizes = tuple(
        (s, int(s * 2 ** (1 / 3)), int(s * 2 ** (2 / 3))) for s in (32, 64, 128, 256, 512)
    )
    anchors = AnchorGenerator(sizes, ((0.5, 1.0, 2.0),) * len(sizes))
    model = RetinaNet(
        body,
        num_classes=num_classes,
        anchor_generator=anchors,
        **_seen_by(backbone, image_size),
        **options,
    )
    model.task = "detection"
    return model


def faster_rcnn(
    num_classes: int = 91,
    pretrained: bool = True,
    image_size: int | tuple[int, int] = 512,
    backbone: str = BACKBONE,
    **options: Any,
) -> nn.Module:
    """Torchvision's Faster R-CNN on maps of stride 4 to 64."""
    body = Pyramid(backbone, (1, 2, 3, 4), pretrained=pretrained, more=LastLevelMaxPool())
    sizes = tuple((s,) for s in (32, 64, 128, 256, 512))
    model = FasterRCNN(
        body,
        num_classes=num_classes,
        rpn_anchor_generator=AnchorGenerator(sizes, ((0.5, 1.0, 2.0),) * len(sizes)),
        box_roi_pool=MultiScaleRoIAlign(["0", "1", "2", "3"], output_size=7, sampling_ratio=2),
        **_seen_by(backbone, image_size),
        **options,
    )
    model.task = "detection"
    return model


class Up(nn.Module):
    """Twice the size, beside the backbone's map of that size."""

    def __init__(self, channels: int, skipped: int, out: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels + skipped, out, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out)
        self.conv2 = nn.Conv2d(out, out, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        """(N, out, H, W) of the skipped map's height and width."""
        x = F.interpolate(x, skip.shape[-2:], mode="nearest")
        x = torch.relu(self.bn1(self.conv1(torch.cat([x, skip], 1))))
        return torch.relu(self.bn2(self.conv2(x)))


class UNet(nn.Module):
    """A timm backbone, and a way up beside it to stride 2."""

    def __init__(self, name: str, num_classes: int, *, pretrained: bool) -> None:
        super().__init__()
        self.backbone = timm.create_model(name, pretrained=pretrained, features_only=True)
        *skipped, channels = self.backbone.feature_info.channels()
        self.ups = nn.ModuleList()
        for width in reversed(skipped):
            out = max(16, min(width, 128))
            self.ups.append(Up(channels, width, out))
            channels = out
        self.head = nn.Conv2d(channels, num_classes, 1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Logits (N, K, H, W) as ``out``."""
        *skips, found = self.backbone(x)
        for up, skip in zip(self.ups, reversed(skips), strict=True):
            found = up(found, skip)
        logits = self.head(found)
        return {"out": F.interpolate(logits, x.shape[-2:], mode="bilinear", align_corners=False)}


def unet(num_classes: int = 21, pretrained: bool = True, backbone: str = BACKBONE) -> nn.Module:
    """A U-Net; what it takes is what its backbone takes."""
    model = UNet(backbone, num_classes, pretrained=pretrained)
    model.pretrained_cfg = timm.get_pretrained_cfg(backbone).to_dict()
    return model
