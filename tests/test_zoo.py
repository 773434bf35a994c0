from __future__ import annotations

import concurrent.futures
import multiprocessing
from pathlib import Path

import pytest
import torch
import zoo

FOLDER = Path(__file__).parent.parent / "examples" / "benchmarks"


@pytest.mark.parametrize("family", zoo.representatives())
def test_one_architecture_per_family(family):
    zoo.survey(zoo.representatives()[family])


def _row(spec):
    try:
        return zoo.survey(spec)
    except Exception as error:  # noqa: BLE001 - the table shows every failure at once
        return {"architecture": spec, "error": f"{type(error).__name__}: {error}"[:500]}


@pytest.mark.zoo
@pytest.mark.timeout(7200)
def test_every_architecture_is_found_planned_and_converted():
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(2, mp_context=context) as pool:
        rows = list(pool.map(_row, zoo.architectures(), chunksize=4))
    failed = [row for row in rows if "error" in row]
    assert not failed, failed
    totals = zoo.write_table(rows, FOLDER)
    assert totals["with BatchNorm"] > 800


@pytest.mark.zoo
@pytest.mark.parametrize("family", zoo.representatives())
def test_every_target_applied_on_one_architecture_per_family(family):
    zoo.survey(zoo.representatives()[family], every_target=True)


FEW = (
    "timm/resnet10t",
    "timm/efficientnet_lite0",
    "timm/levit_128s",
    "timm/regnetx_002",
    "torchvision/googlenet",
    "torchvision/mobilenet_v2",
)


def _exact(spec, dtype, bound):
    errors = zoo.exactness(spec, dtype=dtype)
    assert all(error <= bound for error in errors.values()), errors


@pytest.mark.parametrize("spec", FEW)
def test_exact_targets_are_exact_on_real_networks(spec):
    _exact(spec, torch.float32, 1e-6)


@pytest.mark.zoo
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("family", zoo.representatives())
def test_exact_targets_are_exact_in_every_family(family, dtype):
    bound = 1e-6 if dtype == torch.float32 else 1e-12
    _exact(zoo.representatives()[family], dtype, bound)
