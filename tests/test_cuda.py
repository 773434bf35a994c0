"""The whole way on a GPU, where there is one: layers, conversion, calibration, training, export."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from training_runs import Stop, stop_at

import normswap
from normswap import FineTune
from normswap.layers import (
    BatchRenorm2d,
    CrossIterationBatchNorm2d,
    FilterResponseNorm2d,
)
from normswap.targets import TARGETS

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
FORMATS = (torch.contiguous_format, torch.channels_last)
PRECISIONS = ((torch.float32, 2e-5), (torch.bfloat16, 3e-2), (torch.float16, 4e-3))


def net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 24, 3, stride=2, padding=1), nn.BatchNorm2d(24), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, 5),
    )  # fmt: skip


def images(count=32):
    torch.manual_seed(1)
    x = torch.randn(count, 3, 16, 16)
    return x, (x.mean((1, 2, 3)).argsort().argsort() * 5 // count)


def trained():
    model = net()
    x, _ = images(256)
    with torch.no_grad():
        model.train()(x)
    return model.eval()


def randomised(layer):
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.rand_like(parameter) + 0.5)
    return layer


def relative(a, b):
    a, b = a.detach().double().cpu(), b.detach().double().cpu()
    return float((a - b).norm() / b.norm().clamp_min(1e-12))


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize(("dtype", "room"), PRECISIONS)
@pytest.mark.parametrize("layer", [FilterResponseNorm2d, BatchRenorm2d, nn.GroupNorm])
@pytest.mark.parametrize("shape", [(2, 24, 15, 17), (3, 7, 1, 9), (1, 64, 56, 56)])
def test_layers_compute_what_float64_computes(layer, shape, dtype, room, memory_format):
    torch.manual_seed(2)
    arguments = (1, shape[1]) if layer is nn.GroupNorm else (shape[1],)
    there = randomised(layer(*arguments)).cuda().train()
    here = copy.deepcopy(there).cpu().double()
    x = torch.randn(shape).to(memory_format=memory_format)
    mine = x.to("cuda", dtype, memory_format=memory_format).requires_grad_()
    exact = mine.detach().cpu().double().requires_grad_()
    with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
        y = there(mine)
    expected = here(exact)
    upstream = torch.randn(shape)
    y.backward(upstream.to("cuda", y.dtype, memory_format=memory_format))
    expected.backward(upstream.double())
    assert relative(y, expected) < room
    assert relative(mine.grad, exact.grad) < 2 * room
    for (name, a), b in zip(there.named_parameters(), here.parameters(), strict=True):
        assert relative(a.grad, b.grad) < 2 * room, name


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize(("dtype", "room"), PRECISIONS)
@pytest.mark.parametrize("paper", [False, True])
def test_cbn_follows_its_weights_as_on_the_cpu(dtype, room, memory_format, paper):
    torch.manual_seed(3)
    options = {"variance_rule": "drop", "through_history": False, "sampling": 1} if paper else {}
    conv, norm = nn.Conv2d(6, 8, 3, padding=1), CrossIterationBatchNorm2d(8, window=4, **options)
    here = nn.Sequential(copy.deepcopy(conv), copy.deepcopy(norm)).double()
    there = nn.Sequential(conv, norm).cuda().to(memory_format=memory_format)
    here[1].attach(here[0])
    there[1].attach(there[0])
    for model in (here, there):
        model.train()
    steps = [torch.optim.SGD(m.parameters(), lr=0.01) for m in (here, there)]
    for _ in range(6):
        x = torch.randn(2, 6, 12, 12)
        target = torch.randn(2, 8, 12, 12)
        with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
            y = there(x.cuda().to(memory_format=memory_format))
        expected = here(x.double())
        assert relative(y, expected) < room * 10
        for out, to, step in ((expected, target.double(), steps[0]), (y, target.cuda(), steps[1])):
            step.zero_grad()
            (out.to(to.dtype) - to).square().mean().backward()
            step.step()


@pytest.mark.parametrize("target", sorted(TARGETS))
def test_every_target_converts_trains_and_comes_home(target):
    x, _ = images()
    with torch.no_grad():
        before = trained().cuda()(x.cuda())
    made = normswap.convert(trained().cuda(), target, example_inputs=x[:2].cuda())
    assert all(p.is_cuda for p in made.model.parameters())
    with torch.no_grad():
        there = made.model.eval()(x.cuda())
        here = copy.deepcopy(made.model).cpu()(x)
    assert relative(there, here) < 1e-3
    if target in ("brn", "cbn", "frozen", "syncbn", "gbn"):
        assert relative(there, before) < 1e-4
    made.model.train()
    loss = made.model(x[:8].cuda()).square().mean()
    loss.backward()
    assert torch.isfinite(loss)


@pytest.mark.parametrize("amp", [None, "bf16", "fp16"])
@pytest.mark.parametrize("target", ["gn", "frn", "brn", "cbn"])
def test_fine_tuning_learns(target, amp, tmp_path):
    x, y = images(64)
    model = normswap.convert(trained(), target, example_inputs=x[:2]).model
    options = FineTune(batch_size=2, epochs=2, learning_rate=0.01, amp=amp, device="cuda")
    history = normswap.finetune(model, (x, y), (x, y), options, out=tmp_path / "run")
    assert history.epochs[-1].train_loss < 2.0
    found = normswap.evaluate(model, (x, y), device="cuda")
    assert found.top1 >= history.start.top1


def test_a_broken_run_goes_on_to_the_same_weights(tmp_path):
    x, y = images(64)

    def run(folder, progress=None, resume=False):
        model = normswap.convert(trained(), "cbn", example_inputs=x[:2]).model
        torch.use_deterministic_algorithms(mode=True, warn_only=True)
        options = FineTune(batch_size=2, epochs=3, amp="bf16", device="cuda")
        normswap.finetune(
            model, (x, y), (x, y), options, out=folder, resume=resume, progress=progress
        )
        return model.cpu().state_dict()

    whole = run(tmp_path / "whole")

    with pytest.raises(Stop):
        run(tmp_path / "broken", progress=stop_at(48))
    again = run(tmp_path / "broken", resume=True)
    for name, value in whole.items():
        assert torch.allclose(value.double(), again[name].double(), atol=1e-6), name


def test_calibration_and_the_passage(tmp_path):
    x, y = images(128)
    teacher = trained().cuda()
    model = normswap.convert(copy.deepcopy(teacher), "gn", example_inputs=x[:2].cuda()).model
    found = normswap.calibrate(model, teacher, x.cuda(), seconds=5)
    assert found is not None
    assert next(model.parameters()).is_cuda
    model = normswap.convert(copy.deepcopy(teacher), "gn", example_inputs=x[:2].cuda()).model
    options = FineTune(batch_size=2, epochs=1, passage=0.5, device="cuda")
    normswap.finetune(model, (x, y), (x, y), options)
    path = tmp_path / "model.onnx"
    assert normswap.export_onnx(model.cuda(), path, example_inputs=x[:2].cuda()).passed
    assert normswap.export_onnx(model.cpu(), path, example_inputs=x[:2]).passed


def test_compiled_layers_agree():
    x, _ = images(4)
    for target in ("frn", "brn", "gn"):
        model = normswap.convert(trained().cuda(), target, example_inputs=x.cuda()).model.train()
        twin = copy.deepcopy(model)
        compiled = torch.compile(twin)
        assert relative(compiled(x.cuda()), model(x.cuda())) < 1e-4, target


def test_the_bench_runs_in_every_precision():
    from normswap.benchmark import compare

    x, _ = images(4)
    for amp in (None, "bf16", "fp16"):
        targets = {name: name for name in ("gn", "frn", "brn", "cbn")}
        found = compare(net().cuda(), targets, x.cuda(), rounds=2, warmup=2, onnx=False, amp=amp)
        assert all(row.training is not None and row.peak for row in found.rows)
