"""A tiny detector, a tiny segmentation network, data and runs; importable by child processes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import Dataset
from torchvision.models.detection import FasterRCNN, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.ops import MultiScaleRoIAlign
from training_runs import HARD as HARD_RUN
from training_runs import attached_cbn

from normswap import layers
from normswap.training import finetune

SIZE = 32
KINDS = 3


class Squares(Dataset):
    """One square on each noisy image; its colour is its class.

    ``task`` says what is true of it: a box, or a mask. Noise is drawn from the global generator.
    """

    def __init__(self, count=12, seed=0, task="detection", first=0):
        generator = torch.Generator().manual_seed(seed)
        self.places = torch.randint(0, SIZE // 2, (count, 2), generator=generator).tolist()
        self.task, self.first = task, first

    def __len__(self):
        return len(self.places)

    def __getitem__(self, index):
        x, y = self.places[index]
        edge = SIZE // 2
        image = 0.1 * torch.rand(3, SIZE, SIZE)
        image[index % KINDS, y : y + edge, x : x + edge] += 0.9
        if self.task == "segmentation":
            mask = torch.zeros(SIZE, SIZE, dtype=torch.long)
            mask[y : y + edge, x : x + edge] = 1 + index % KINDS
            return image, mask
        return image, {
            "boxes": torch.tensor([[x, y, x + edge, y + edge]], dtype=torch.float32),
            "labels": torch.tensor([index % KINDS + self.first]),
        }


NORMS = {
    "bn": lambda conv: nn.BatchNorm2d(conv.out_channels),
    "gn": lambda conv: nn.GroupNorm(2, conv.out_channels),
    "frn": lambda conv: layers.FilterResponseNorm2d(conv.out_channels),
    "brn": lambda conv: layers.BatchRenorm2d(conv.out_channels, warmup=2, r_ramp=9, d_ramp=6),
    "cbn": lambda conv: attached_cbn(conv, burn_in=3),
}


class Body(nn.Module):
    out_channels = 16

    def __init__(self, norm="bn"):
        super().__init__()
        widths = (3, 8, 16, 16)
        parts = []
        for index in range(3):
            stride = 2 if index < 2 else 1
            conv = nn.Conv2d(widths[index], widths[index + 1], 3, stride, 1, bias=False)
            parts += [conv, NORMS[norm](conv), nn.ReLU()]
        self.parts = nn.Sequential(*parts)

    def forward(self, x):
        return self.parts(x)


def detector(norm="bn", kinds=KINDS):
    torch.manual_seed(0)
    return RetinaNet(
        Body(norm),
        num_classes=kinds,
        min_size=SIZE,
        max_size=SIZE,
        anchor_generator=AnchorGenerator(((16,),), ((1.0,),)),
        detections_per_img=5,
        topk_candidates=20,
    )


def two_stage_detector(norm="bn", kinds=KINDS):
    torch.manual_seed(0)
    return FasterRCNN(
        Body(norm),
        num_classes=kinds + 1,
        min_size=SIZE,
        max_size=SIZE,
        rpn_anchor_generator=AnchorGenerator(((16,),), ((1.0,),)),
        box_roi_pool=MultiScaleRoIAlign(["0"], output_size=3, sampling_ratio=2),
        rpn_pre_nms_top_n_train=50,
        rpn_post_nms_top_n_train=20,
        rpn_pre_nms_top_n_test=50,
        rpn_post_nms_top_n_test=20,
        box_batch_size_per_image=8,
        box_detections_per_img=5,
    )


class Segmenter(nn.Module):
    """``out`` and, in training, ``aux``."""

    def __init__(self, norm="bn", kinds=KINDS):
        super().__init__()
        torch.manual_seed(0)
        self.backbone = Body(norm)
        self.drop = nn.Dropout(0.1)
        self.head, self.side = nn.Conv2d(16, kinds + 1, 1), nn.Conv2d(16, kinds + 1, 1)

    def forward(self, x):
        features = self.backbone(x)
        out = nn.functional.interpolate(self.head(self.drop(features)), x.shape[-2:])
        return {"out": out, "aux": self.side(features)} if self.training else {"out": out}


MODELS = {"detection": detector, "segmentation": Segmenter}

HARD = replace(HARD_RUN, epochs=2, learning_rate=0.01, label_smoothing=0.0, mixup=0.0)


def hard_run(task, norm, out, resume=True, progress=None):
    """A run in which everything that has a state is at work."""
    model = MODELS[task](norm)
    history = finetune(
        model,
        Squares(11, task=task),
        Squares(5, seed=1, task=task),
        HARD,
        out=out,
        resume=resume,
        progress=progress,
        task=task,
    )
    return model, history


def child_run(task, norm, out, result):
    """``hard_run`` in a process of its own; its weights go to ``result``."""
    torch.set_num_threads(1)
    model, _ = hard_run(task, norm, out)
    torch.save(model.state_dict(), Path(result).with_suffix(".part"))
    Path(result).with_suffix(".part").replace(result)
