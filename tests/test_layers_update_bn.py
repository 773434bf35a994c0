"""torch.optim.swa_utils.update_bn counts the statistics that BatchNorm would have."""

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, update_bn

import normswap

X = torch.randn(4, 3, 12, 12, generator=torch.Generator().manual_seed(0))


def net():
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU()),
        *(nn.Conv2d(6, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 3), nn.BatchNorm2d(4)),
    )


def batches():
    draw = torch.Generator().manual_seed(1)
    scales = (1.0, 3.0, 0.3, 2.0)
    return [scale * torch.randn(4, 3, 12, 12, generator=draw) + scale for scale in scales]


@pytest.mark.parametrize("target", ["brn", "cbn", "naive-cbn", "brn(warmup=2)"])
@pytest.mark.parametrize("trained", [True, False])
def test_it_equals_batch_norms_recomputation(target, trained):
    twin, model = net(), normswap.convert(net(), target, example_inputs=X).model
    if trained:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for x in batches():
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
        twin.load_state_dict(model.state_dict())
    momenta = [m.momentum for m in model.modules() if hasattr(m, "momentum")]
    iterations = [m.iteration for m in model.modules() if hasattr(m, "momentum")]
    update_bn(batches(), model)
    update_bn(batches(), twin)
    for name, value in twin.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], value, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model.eval()(X), twin.eval()(X), rtol=1e-4, atol=1e-4)
    # nothing else has happened
    assert [m.momentum for m in model.modules() if hasattr(m, "momentum")] == momenta
    assert [m.iteration for m in model.modules() if hasattr(m, "momentum")] == iterations


@pytest.mark.parametrize("target", ["brn", "cbn"])
def test_it_works_on_an_averaged_model_and_training_goes_on(target):
    model = normswap.convert(net(), target, example_inputs=X).model
    average = AveragedModel(model)
    average.update_parameters(model)
    update_bn(batches(), average)
    twin = net()
    twin.load_state_dict(average.module.state_dict())
    twin.train()
    update_bn(batches(), twin)
    mean = average.module[4].running_mean
    torch.testing.assert_close(mean, twin[4].running_mean, rtol=1e-4, atol=1e-5)
    # the next step is the target's own again
    layer = average.module[4]
    average.train()
    before = layer.iteration
    average(batches()[0]).sum().backward()
    assert not layer._was_reset
    if target == "cbn":
        assert layer.iteration == before + 1
    else:
        torch.manual_seed(2)
        y = torch.randn(2, 6, 4, 4) + 3
        assert not torch.allclose(layer(y), nn.BatchNorm2d(6).train()(y), atol=0.1)


@pytest.mark.parametrize("target", ["brn", "cbn"])
def test_a_fresh_layer_with_a_cumulative_average_trains_as_it_is_defined(target):
    model = normswap.convert(net(), target, example_inputs=X).model
    for layer in model.modules():
        if hasattr(layer, "momentum"):
            layer.momentum = None
    model(batches()[0]).sum().backward()
    with torch.no_grad():
        y = model(batches()[1])
    plain = net()
    assert not torch.allclose(plain(batches()[1]), y, atol=1e-2)
