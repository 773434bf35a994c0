"""From the BatchNorm original to the pure layer, and nothing left of the way."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import timm
import torch
from torch import nn
from training_runs import Net, samples, weights

import normswap
import normswap.passage
from normswap import FineTune, Passage, finetune
from normswap.errors import NormSwapError, TrainingError
from normswap.recipes import RECIPES
from normswap.targets import TARGETS

PER_SAMPLE = [t for t in TARGETS if RECIPES[t].per_sample and not RECIPES[t].wired]


def seasoned(model):
    """Running statistics and affine parameters as of a trained network, one channel dead."""
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean.copy_(torch.randn(module.running_mean.shape, generator=generator))
            var = torch.rand(module.running_var.shape, generator=generator) + 0.3
            var[0] = 1e-14
            module.running_var.copy_(var)
            with torch.no_grad():
                module.weight.copy_(torch.randn(module.weight.shape, generator=generator))
                module.weight[1] = 0.0
                module.bias.copy_(torch.randn(module.bias.shape, generator=generator))
    return model.eval()


def plain():
    torch.manual_seed(0)
    return seasoned(
        nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Conv2d(8, 12, 3, padding=1),
            nn.BatchNorm2d(12),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(12, 3),
        )
    )


def volume():
    torch.manual_seed(0)
    return seasoned(nn.Sequential(nn.Conv3d(1, 8, 3), nn.BatchNorm3d(8), nn.ReLU()))


def fused():
    torch.manual_seed(0)
    return seasoned(timm.create_model("efficientnet_b0", num_classes=5))


NETS = {
    "plain": (plain, (2, 3, 9, 9)),
    "volume": (volume, (2, 1, 5, 6, 7)),
    "fused": (fused, (2, 3, 64, 64)),
}


def converted(name, target, **options):
    make, shape = NETS[name]
    original = make()
    inputs = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    found = normswap.convert(
        copy.deepcopy(original), target, example_inputs=inputs, **options
    ).model
    return original, found, inputs


@pytest.mark.parametrize("init", ["match", "copy", "reset"])
@pytest.mark.parametrize("target", PER_SAMPLE)
@pytest.mark.parametrize("name", NETS)
def test_it_begins_as_the_original_and_ends_as_the_pure_layer(name, target, init):
    original, model, inputs = converted(name, target, init=init)
    twin, before = copy.deepcopy(model), weights(model)
    passage = Passage(model, steps=3)
    with torch.no_grad():
        assert torch.equal(model(inputs), original(inputs))
        assert passage.share == 0
        passage.step()
        passage.step()
        assert passage.share == pytest.approx(2 / 3)
        assert not torch.equal(model(inputs), original(inputs))
        assert passage.step() == 1
        assert torch.equal(model(inputs), twin(inputs))
    assert [type(m) for m in model.modules()] == [type(m) for m in twin.modules()]
    assert [vars(m).keys() for m in model.modules()] == [vars(m).keys() for m in twin.modules()]
    assert weights(model).keys() == before.keys()


def test_the_state_dict_never_holds_anything_of_it():
    _, model, _ = converted("plain", "frn")
    before = list(model.state_dict())
    passage = Passage(model, steps=2)
    passage.step()
    assert list(model.state_dict()) == before


def test_halfway_the_layer_is_between_the_two():
    torch.manual_seed(0)
    net = seasoned(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)))
    net[1].running_var[0] = 0.5
    x = torch.randn(4, 3, 9, 9)
    model = normswap.convert(copy.deepcopy(net), "gn", example_inputs=x).model
    with torch.no_grad():
        ends = net(x), model(x)
        passage = Passage(model, steps=4)
        passage.step()
        torch.testing.assert_close(model(x), 0.75 * ends[0] + 0.25 * ends[1])


def test_all_parameters_learn_on_the_way():
    _, model, inputs = converted("plain", "frn")
    passage = Passage(model.train(), steps=4)
    for _ in range(2):
        model.zero_grad()
        model(inputs).square().sum().backward()
        missing = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
        # a channel whose population never varied gives its slope nothing to learn from
        assert missing == []
        passage.step()


def test_gradients_are_those_of_the_original_at_the_beginning():
    original, model, inputs = converted("plain", "gn")
    model, original, inputs = model.double(), original.double(), inputs.double()
    Passage(model, steps=2)
    for net in (model, original):
        net(inputs).square().sum().backward()
    torch.testing.assert_close(model[0].weight.grad, original[0].weight.grad)
    torch.testing.assert_close(model[4].bias.grad, original[4].bias.grad)


def test_a_copy_goes_its_own_way_and_pickles():
    _, model, inputs = converted("plain", "gn")
    passage = Passage(model, steps=4)
    passage.step()
    twins = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    with torch.no_grad():
        then = model(inputs)
        passage.finish()
        assert not torch.equal(model(inputs), then)
        for twin in twins:
            assert torch.equal(twin(inputs), then)


def test_it_can_be_saved_and_exported_only_when_it_is_over(tmp_path):
    _, model, inputs = converted("plain", "gn")
    passage = Passage(model, steps=4)
    passage.step()
    with pytest.raises(NormSwapError, match="25% through its passage"):
        normswap.save(model, tmp_path / "artefact")
    with pytest.raises(NormSwapError, match="25% through its passage"):
        normswap.export_onnx(model, tmp_path / "model.onnx", example_inputs=inputs)
    passage.finish()
    normswap.save(model, tmp_path / "artefact")


def test_an_artefact_keeps_what_a_passage_needs(tmp_path):
    original, model, inputs = converted("plain", "frn")
    normswap.save(model, tmp_path / "out")
    again = normswap.load(tmp_path / "out", into=plain())
    with torch.no_grad():
        assert torch.equal(again(inputs), model(inputs))
        Passage(again, steps=1)
        assert torch.equal(again(inputs), original(inputs))


def test_a_fine_tuned_artefact_keeps_it_no_more(tmp_path):
    _, model, _ = converted("plain", "gn")
    normswap.save(model, tmp_path / "out")
    data = torch.randn(8, 3, 9, 9), torch.arange(8) % 3
    finetune(model, data, options=FineTune(epochs=1, passage=0.5))
    normswap.save(model, tmp_path / "out", force=True)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "README.md",
        "model.safetensors",
        "normswap.json",
    ]
    with pytest.raises(TrainingError, match="without the statistics"):
        Passage(normswap.load(tmp_path / "out", into=plain()), steps=1)


@pytest.mark.parametrize("target", ["gn", "ln", "in", "frn"])
def test_a_calibrated_start_is_led_or_refused(target):
    """At a = 0 it is the original, whatever a calibration did to γ and β; else it says no."""
    original, model, inputs = converted("plain", target)
    images = torch.cat([inputs, inputs.flip(3)])
    normswap.calibrate(model, original, images, steps=3, parameters="norms")
    ends = copy.deepcopy(model)
    with torch.no_grad():
        passage = Passage(model, steps=2)
        assert torch.equal(model(inputs), original(inputs))
        passage.finish()
        assert torch.equal(model(inputs), ends(inputs))
    normswap.calibrate(model, original, images, steps=3, parameters="all")
    with pytest.raises(TrainingError, match=r"moved \S+ and \d+ others; need .* without a passage"):
        Passage(model, steps=2)
    assert not normswap.passage.returns(model)


@pytest.mark.parametrize("target", ["frozen", {"1": "gn", "4": "frozen"}], ids=str)
def test_calibrated_layers_that_are_not_on_their_way_lead_nowhere(target):
    original, model, inputs = converted("plain", target)
    assert normswap.passage.returns(model)
    images = torch.cat([inputs, inputs.flip(3)])
    normswap.calibrate(model, original, images, steps=3, parameters="norms")
    assert not normswap.passage.returns(model)


@pytest.mark.parametrize("target", ["brn", "frozen"])
def test_targets_with_running_statistics_need_none(target):
    _, model, _ = converted("plain", target)
    with pytest.raises(TrainingError, match="brn, cbn and frozen need no passage"):
        Passage(model, steps=3)


@pytest.mark.parametrize("steps", [0, 1.5, True, None])
def test_steps_must_be_a_number_of_steps(steps):
    _, model, _ = converted("plain", "gn")
    with pytest.raises(TrainingError, match="steps"):
        Passage(model, steps=steps)


def test_sixteen_bits_stay_sixteen_bits():
    original, model, inputs = converted("plain", "frn")
    model, original = model.bfloat16(), original.bfloat16()
    passage = Passage(model, steps=2)
    with torch.no_grad():
        torch.testing.assert_close(
            model(inputs.bfloat16()), original(inputs.bfloat16()), rtol=0.05, atol=0.05
        )
        passage.step()
        assert model(inputs.bfloat16()).dtype == torch.bfloat16


# --- in the loop --------------------------------------------------------------------------------


class StoppedError(Exception):
    pass


def trained():
    """A BatchNorm network whose running statistics are those of its data."""
    images, _ = samples()
    net = Net("bn")
    with torch.no_grad():
        for _ in range(20):
            net(images)
    return net.eval()


def network(target="gn"):
    images, _ = samples()
    return normswap.convert(trained(), target, example_inputs=images[:2]).model


LONG = {"batch_size": 4, "epochs": 3, "learning_rate": 0.02, "passage": 0.6}


@pytest.mark.parametrize("target", ["gn", "frn"])
@pytest.mark.parametrize(
    "options",
    [
        {"ema": 0.9},
        {"gradient_accumulation": 3},
        {"amp": "bf16"},
        {"clip_grad": 1.0, "optimizer": "adamw"},
    ],
    ids=lambda options: next(iter(options)),
)
@pytest.mark.parametrize("at", [2, 5, 9])
def test_a_broken_run_goes_on_exactly(target, options, at, tmp_path):
    recipe = FineTune(**{**LONG, **options, "checkpoint_every": 0.0, "workers": 0})
    straight = network(target)
    whole = finetune(straight, samples(), samples(8, seed=1), recipe)

    def stop(now):
        if now.step == min(at, now.steps - 1):
            raise StoppedError

    with pytest.raises(StoppedError):
        finetune(
            network(target), samples(), samples(8, seed=1), recipe, out=tmp_path, progress=stop
        )
    model = network(target)
    history = finetune(model, samples(), samples(8, seed=1), recipe, out=tmp_path, resume=True)
    assert history.resumed_from is not None
    assert [row.val_loss for row in history.epochs] == [row.val_loss for row in whole.epochs]
    assert [row.passage for row in history.epochs] == [row.passage for row in whole.epochs]
    for name, value in weights(straight).items():
        assert torch.equal(value, weights(model)[name]), name
    assert [type(m) for m in model.modules()] == [type(m) for m in network(target).modules()]


def test_the_same_object_can_go_on_after_an_interruption(tmp_path):
    recipe = FineTune(**LONG, checkpoint_every=0.0)
    straight, model = network(), network()
    finetune(straight, samples(), options=recipe)

    def stop(now):
        if now.step == 4:
            raise StoppedError

    with pytest.raises(StoppedError):
        finetune(model, samples(), options=recipe, out=tmp_path, progress=stop)
    with pytest.raises(NormSwapError, match="through its passage"):
        normswap.save(model, tmp_path / "artefact")
    finetune(model, samples(), options=recipe, out=tmp_path, resume=True)
    for name, value in weights(straight).items():
        assert torch.equal(value, weights(model)[name]), name


def test_the_history_knows_the_original_and_the_start(tmp_path):
    images, labels = samples(8, seed=1)
    original, model = trained(), network()
    wanted = [normswap.evaluate(m, (images, labels)) for m in (original, model)]
    history = finetune(
        model, samples(), (images, labels), FineTune(**LONG, keep="best"), out=tmp_path
    )
    assert [history.original, history.start] == wanted
    assert [row.passage for row in history.epochs] == pytest.approx([6 / 11, 1.0, 1.0])
    assert history.best.epoch != 1  # in the middle of the passage
    first = normswap.training.read_metrics(tmp_path)[0]
    assert (first["kind"], first["step"]) == ("start", 0)
    assert first["original_top1"] == wanted[0].top1
    assert first["start_loss"] == pytest.approx(wanted[1].loss)
    assert f"BatchNorm original {100 * wanted[0].top1:.2f} %" in history.verdict


def test_a_checkpointed_forward_is_recomputed_at_the_same_place():
    images, labels = samples()
    straight, again = network("frn"), network("frn")

    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = again

        def forward(self, x):
            return torch.utils.checkpoint.checkpoint(self.inner, x, use_reentrant=False)

    wrapped = Checkpointed()
    passages = [Passage(straight.train(), steps=3), Passage(again.train(), steps=3)]
    for _ in range(2):
        for net, passage in zip((straight, wrapped), passages, strict=True):
            nn.functional.cross_entropy(net(images), labels).backward()
            passage.step()
    for mine, theirs in zip(straight.parameters(), again.parameters(), strict=True):
        assert torch.equal(mine.grad, theirs.grad)


def test_a_state_can_be_read_without_unpickling_code():
    _, model, inputs = converted("plain", "frn")
    passage = Passage(model, steps=4)
    passage.step()
    file = io.BytesIO()
    torch.save(passage.state(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    _, other, _ = converted("plain", "frn")
    fresh = Passage(other, steps=9)
    fresh.load_state(state)
    assert fresh.share == 0.25
    with torch.no_grad():
        assert torch.equal(other(inputs), model(inputs))
