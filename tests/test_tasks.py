"""Models that are no plain classifiers: they convert, and take a training step."""

from __future__ import annotations

import pytest
import timm
import torch
import torchvision
from torch.utils._pytree import tree_leaves

import normswap


def detector(name):
    model = torchvision.models.get_model(name, weights=None, weights_backbone=None)
    model.transform.min_size, model.transform.max_size = (96,), 128
    if hasattr(model, "rpn"):  # a thousand boxes of random weights show no more than thirty
        model.rpn._pre_nms_top_n = model.rpn._post_nms_top_n = {"training": 30, "testing": 30}
    images = [torch.rand(3, 96, 128), torch.rand(3, 96, 96)]
    box = {"boxes": torch.tensor([[10.0, 10.0, 60.0, 70.0]]), "labels": torch.tensor([1])}
    return model, images, (images, [box, box])


def segmenter():
    model = torchvision.models.segmentation.deeplabv3_resnet50(weights_backbone=None, aux_loss=True)
    x = torch.rand(2, 3, 64, 64)
    return model, x, (x,)


def video(name, frames, size):
    x = torch.rand(2, 3, frames, size, size)
    return torchvision.models.get_model(name, weights=None), x, (x,)


def features(name):
    x = torch.rand(2, 3, 64, 64)
    return timm.create_model(name, features_only=True), x, (x,)


TASKS = {
    "fasterrcnn": lambda: detector("fasterrcnn_resnet50_fpn_v2"),
    "retinanet": lambda: detector("retinanet_resnet50_fpn_v2"),
    "deeplab": segmenter,
    "r3d": lambda: video("r3d_18", 8, 48),
    "s3d": lambda: video("s3d", 16, 224),
    "features": lambda: features("resnet18"),
    "features of fused norms": lambda: features("efficientnet_b0"),
}

EVERY = ("gn", "ln", "in", "frn", "brn", "naive-cbn", "frozen")


def take_a_step(task, target):
    torch.manual_seed(0)
    model, inputs, arguments = TASKS[task]()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    result = normswap.convert(model, target, example_inputs=inputs, optimizer=optimizer)
    assert result.replaced
    model.train()
    for _ in range(2):
        found = [t for t in tree_leaves(model(*arguments)) if isinstance(t, torch.Tensor)]
        optimizer.zero_grad()
        sum(t.mean() for t in found if t.requires_grad).backward()
        optimizer.step()
    moved = [p for p in model.parameters() if p.grad is not None]
    assert moved
    assert all(p.isfinite().all() for p in model.parameters())
    return result


@pytest.mark.parametrize("task", [task for task in TASKS if task != "s3d"])  # s3d: in the zoo
def test_a_training_step_after_conversion(task):
    take_a_step(task, "cbn")


@pytest.mark.zoo
@pytest.mark.parametrize("target", EVERY)
@pytest.mark.parametrize("task", TASKS)
def test_a_training_step_with_every_target(task, target):
    take_a_step(task, target)


@pytest.mark.zoo
def test_a_training_step_of_s3d_with_cbn():
    take_a_step("s3d", "cbn")
