"""Fine-tuning and evaluation: what trains, what it reports, what it refuses."""

from __future__ import annotations

import contextlib
import inspect
import logging
import math

import pytest
import torch
import torch.nn.functional as F
from timm.scheduler import scheduler_factory
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset
from training_runs import CLASSES, Augmented, Net, attached_cbn, samples, weights

from normswap import convert, layers
from normswap.errors import DataError, TrainingError
from normswap.provenance import provenance_of
from normswap.training import (
    FineTune,
    classifier_of,
    distillation_loss,
    evaluate,
    finetune,
    is_norm,
    parameter_groups,
    read_metrics,
)
from normswap.training.batches import Share, epoch_order, slices
from normswap.training.optimisation import make_optimizer, make_scheduler
from normswap.training.parameters import relative_steps, scale_schedules, steady_statistics

PAIR = samples(24)


def quick(**changes):
    return FineTune(**({"batch_size": 4, "epochs": 1, "tensorboard": False} | changes))


def train(model=None, data=PAIR, val=None, *, out=None, progress=None, **changes):
    model = Net() if model is None else model
    return model, finetune(model, data, val, quick(**changes), out=out, progress=progress)


def changes(before, model):
    return {name for name, value in weights(model).items() if not torch.equal(before[name], value)}


# evaluation


class Fixed(nn.Module):
    """Logits that were thought up; the image is a row number."""

    def __init__(self, logits):
        super().__init__()
        self.register_buffer("logits", logits)

    def forward(self, x):
        return self.logits[x[:, 0].long()]


def test_evaluate_counts_what_can_be_counted_by_hand():
    logits = torch.tensor(
        [
            [9.0, 1, 2, 3, 4, 5, 6],  # class 0: first
            [9.0, 1, 2, 3, 4, 5, 6],  # class 2: fifth of 9 6 5 4 3
            [9.0, 1, 2, 3, 4, 5, 6],  # class 3: fifth
            [9.0, 1, 2, 3, 4, 5, 6],  # class 1: last
        ]
    )
    labels = torch.tensor([0, 2, 3, 1])
    found = evaluate(Fixed(logits), (torch.arange(4.0)[:, None], labels), batch_size=3)
    assert (found.top1, found.top5, found.images) == (0.25, 0.5, 4)
    expected = -sum(math.log(math.exp(logits[0][k]) / logits[0].exp().sum()) for k in labels) / 4
    assert found.loss == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("form", ["pair", "dataset", "loader", "list", "workers", "iterable"])
def test_evaluate_takes_every_form_of_data(form):
    class Stream(IterableDataset):
        def __iter__(self):
            return iter(TensorDataset(*PAIR))

    model = Net().train()
    model.fc.eval()
    expected = evaluate(Net(), PAIR)
    data = {
        "pair": PAIR,
        "dataset": TensorDataset(*PAIR),
        "loader": DataLoader(TensorDataset(*PAIR), batch_size=5),
        "list": [(image, int(label)) for image, label in zip(*PAIR, strict=True)],
        "workers": [(image, int(label)) for image, label in zip(*PAIR, strict=True)],
        "iterable": Stream(),
    }[form]
    state = torch.get_rng_state()
    found = evaluate(model, data, batch_size=7, workers=1 if form == "workers" else 0)
    assert (found.top1, found.images) == (expected.top1, 24)
    assert found.loss == pytest.approx(expected.loss, rel=1e-6)
    assert model.training
    assert not model.fc.training
    assert torch.equal(state, torch.get_rng_state())


def test_evaluate_with_few_classes_counts_top5_as_all():
    assert evaluate(Net(), PAIR).top5 == 1.0


@pytest.mark.parametrize(
    ("output", "need"),
    [
        (lambda x: {"out": x.flatten(1)[:, :3]}, None),
        (lambda x: (x.flatten(1)[:, :3], x), None),
        (lambda x: x, "need logits of shape"),
        (lambda _: "logits", "need logits of shape"),
    ],
)
def test_outputs_of_many_kinds(output, need):
    class Odd(nn.Module):
        def forward(self, x):
            return output(x)

    with pytest.raises(TrainingError, match=need) if need else contextlib.nullcontext():
        assert evaluate(Odd(), PAIR).images == 24


@pytest.mark.parametrize(
    ("labels", "text"),
    [
        (torch.full((24,), 3), r"got class 3; need 0 to 2.*num_classes=4"),
        (torch.full((24,), -1), r"got class -1"),
        (torch.zeros(24), "got torch.float32"),
        (torch.zeros(24, 2, dtype=torch.long), "as many labels as images"),
        (torch.zeros(3, dtype=torch.long), "as many labels as images"),
    ],
)
def test_labels_that_are_no_class_of_the_model(labels, text):
    with pytest.raises(DataError, match=text):
        evaluate(Net(), (PAIR[0], labels))
    with pytest.raises(DataError, match=text):
        train(data=(PAIR[0], labels))


def test_data_that_are_none():
    with pytest.raises(DataError, match="got int"):
        evaluate(Net(), 3)
    with pytest.raises(DataError, match="at least one"):
        evaluate(Net(), (PAIR[0][:0], PAIR[1][:0]))
    with pytest.raises(DataError, match="at least one per process"):
        train(data=(PAIR[0][:0], PAIR[1][:0]))
    with pytest.raises(TrainingError, match="need a device of this machine"):
        evaluate(Net(), PAIR, device="nonsense")


# what is trained


def test_finetune_learns_and_reports(tmp_path, caplog):
    caplog.set_level(logging.INFO, "normswap")
    seen = []
    model, history = train(
        data=samples(60),
        val=samples(30, seed=1),
        out=tmp_path,
        epochs=4,
        learning_rate=0.1,
        log_every=5,
        progress=seen.append,
    )
    assert history.epochs[-1].val_top1 > 0.8
    assert history.epochs[-1].train_loss < history.epochs[0].train_loss
    assert history.epochs[-1].val_top1 == evaluate(model, samples(30, seed=1)).top1
    assert (history.steps, len(seen), seen[-1].steps) == (60, 60, 60)
    assert seen[-1].eta_seconds == 0
    assert seen[0].eta_seconds > 0
    rows = read_metrics(tmp_path)
    assert [row["step"] for row in rows if row["kind"] == "step"] == list(range(5, 61, 5))
    assert [row["epoch"] for row in rows if row["kind"] == "epoch"] == [1, 2, 3, 4]
    assert (tmp_path / "learning_curve.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "best.pt",
        "last.pt",
        "learning_curve.png",
        "metrics.jsonl",
    ]
    assert "epoch 4/4" in caplog.text
    assert provenance_of(model).history[-1]["step"] == "fine-tuned"


def test_one_update_is_the_plain_sgd_step():
    """Against the definition: w ← w − lr·(∇ + decay·w), decay 0 for norms and biases."""
    model = Net("gn")
    before = weights(model)
    order = epoch_order(4, seed=0, epoch=0)
    images, labels = PAIR[0][:4][order], PAIR[1][:4][order]
    reference = Net("gn").train()
    F.cross_entropy(reference(images), labels).backward()
    train(
        model,
        (PAIR[0][:4], PAIR[1][:4]),
        optimizer="momentum",
        momentum=0.0,
        weight_decay=0.1,
        learning_rate=0.5,
        warmup_epochs=0,
    )
    for name, parameter in reference.named_parameters():
        decay = 0.1 if name in ("conv1.weight", "conv2.weight", "fc.weight") else 0.0
        expected = before[name] - 0.5 * (parameter.grad + decay * before[name])
        torch.testing.assert_close(model.state_dict()[name], expected, rtol=1e-5, atol=1e-6)


def test_accumulation_equals_the_larger_batch_for_gn(caplog):
    caplog.set_level(logging.INFO, "normswap")
    options = {"learning_rate": 0.1, "warmup_epochs": 0, "clip_grad": 0.5}
    whole, _ = train(Net("gn"), batch_size=6, **options)
    parts, history = train(Net("gn"), batch_size=2, gradient_accumulation=3, **options)
    assert history.steps == 4
    for name, value in weights(whole).items():
        torch.testing.assert_close(parts.state_dict()[name], value, rtol=1e-4, atol=1e-6)
    assert "does not enlarge the batch that a BatchNorm sees" in caplog.text


def test_incomplete_accumulation_at_the_end_of_an_epoch_is_averaged_over_what_there_is():
    options = {"learning_rate": 0.1, "warmup_epochs": 0}
    data = (PAIR[0][:4], PAIR[1][:4])
    plain, _ = train(Net("gn"), data, batch_size=2, **options, gradient_accumulation=2)
    longer, history = train(Net("gn"), data, batch_size=2, **options, gradient_accumulation=99)
    assert history.steps == 1
    assert all(torch.equal(weights(plain)[k], v) for k, v in weights(longer).items())


def test_no_decay_on_norms_biases_and_what_the_model_names():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(1, 4, 1)
            self.frn = layers.FilterResponseNorm2d(4, learnable_eps=True)
            self.wide = nn.LayerNorm((4, 2, 2))
            self.token = nn.Parameter(torch.zeros(1, 4))
            self.frozen = nn.Parameter(torch.zeros(4, 4), requires_grad=False)

        def no_weight_decay(self):
            return {"token"}

    model = Own()
    decaying, steady = parameter_groups(model, 0.1)
    assert [id(p) for p in decaying["params"]] == [id(model.conv.weight)]
    named = {id(p): name for name, p in model.named_parameters()}
    assert {named[id(p)] for p in steady["params"]} == {
        "conv.bias",
        "token",
        "wide.weight",
        "wide.bias",
        *(f"frn.{name}" for name in ("weight", "bias", "tau", "eps_l")),
    }
    assert steady["weight_decay"] == 0.0


def test_steps_by_the_rule_are_relative_to_the_weights():
    """A kernel's first step is a share of its own size; vectors keep the rate, a given rate too."""
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 1)
    )
    sizes = (0.7, 0.09, 0.0)  # the last: a layer that begins at 0
    for kernel, size in zip((net[0], net[2], net[3]), sizes, strict=True):
        nn.init.constant_(kernel.weight, size)
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    for options, shares in (
        (FineTune(weight_decay=0.0, scheduler="none"), (2.0, 0.25, 0.5)),
        (FineTune(weight_decay=0.0, scheduler="cosine", warmup_epochs=0), (2.0, 0.25, 0.5)),
        (FineTune(weight_decay=0.0, scheduler="none", learning_rate=1e-3), (1.0, 1.0, 1.0)),
    ):
        net.load_state_dict(before, strict=False)
        optimizer = make_optimizer(net, options, 1e-3)
        make_scheduler(optimizer, options, 1e-3, 10)
        for parameter in net.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        for kernel, name, share in zip((0, 2, 3), ("0", "2", "3"), shares, strict=True):
            step = before[f"{name}.weight"] - net[kernel].weight
            assert torch.allclose(step, torch.full_like(step, share * 1e-3), rtol=1e-3)
            assert torch.allclose(before[f"{name}.bias"] - net[kernel].bias, torch.tensor(1e-3))
    assert len(optimizer.param_groups) == 2


@pytest.mark.parametrize(("name", "relative"), [("adamw", True), ("lamb", False), ("sgd", False)])
def test_an_optimizer_that_scales_its_steps_itself_is_left_alone(name, relative):
    optimizer = make_optimizer(Net("gn"), FineTune(optimizer=name), 1e-3)
    assert any("lr_scale" in group for group in optimizer.param_groups) == relative


def test_sizes_that_are_no_numbers_are_left_to_the_run_to_report():
    net = nn.Sequential(nn.Conv2d(3, 4, 3))
    nn.init.constant_(net[0].weight, float("nan"))
    groups = relative_steps(parameter_groups(net, 0.1))
    assert [group["lr_scale"] for group in groups] == [0.25, 1.0]


@pytest.mark.parametrize("norm", ["bn", "gn", "frn", "brn", "cbn"])
def test_norms_only_changes_norms_only(norm):
    model = Net(norm)
    before = weights(model)
    model, _ = train(model, norms_only=True, learning_rate=0.1)
    changed = {
        name for name, value in weights(model).items() if not torch.equal(before[name], value)
    }
    assert {name.split(".")[0] for name in changed} == {"norm1", "norm2"}
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_freeze_backbone_changes_the_classifier_only():
    model = Net("bn")
    model.conv1.weight.requires_grad_(False)
    model.eval()
    before = weights(model)
    train(model, freeze_backbone=True, learning_rate=0.1)
    changed = {
        name for name, value in weights(model).items() if not torch.equal(before[name], value)
    }
    assert changed == {"fc.weight", "fc.bias"}  # running statistics stand still too
    assert not any(module.training for module in model.modules())
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == ["conv1.weight"]


def test_flags_come_back_when_training_fails():
    model = Net().eval()
    with pytest.raises(DataError):
        train(model, data=(PAIR[0], PAIR[1] + 7), norms_only=True)
    assert not any(module.training for module in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_nothing_to_train():
    with pytest.raises(TrainingError, match="no parameter that requires a gradient"):
        train(Net().requires_grad_(False))


def test_classifier_of_timm_and_torchvision_models():
    import timm
    import torchvision

    model = timm.create_model("resnet18", num_classes=5)
    assert classifier_of(model) is model.fc
    model = torchvision.models.squeezenet1_0(num_classes=5)
    assert classifier_of(model) is model.classifier[1]


def test_is_norm_knows_timms_norms_and_no_containers():
    import timm.layers

    class PreNormBlock(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(3, 3))

    assert is_norm(timm.layers.BatchNormAct2d(4))
    assert is_norm(timm.layers.LayerNorm2d(4))
    assert is_norm(layers.ThresholdedLinearUnit(4))
    assert not is_norm(PreNormBlock())


def test_average_is_what_is_validated_and_left():
    seen = {}

    def progress(now):
        seen[now.step] = {k: v.clone() for k, v in model.state_dict().items()}

    model = Net("bn")
    before = weights(model)
    _, history = train(
        model,
        val=PAIR,
        ema=0.5,
        learning_rate=0.2,
        progress=progress,
        data=(PAIR[0][:8], PAIR[1][:8]),
    )
    # ModelEmaV3 with its warm-up: decay 0 at step 1, then min(0.5, 1 − 2^(−2/3))
    decay = min(0.5, 1 - 2 ** (-2 / 3))
    for name, value in weights(model).items():
        if value.is_floating_point():
            expected = decay * seen[1][name] + (1 - decay) * seen[2][name]
            torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-6)
    assert not torch.equal(before["fc.weight"], model.fc.weight)
    assert history.epochs[0].val_loss == pytest.approx(evaluate(model, PAIR).loss, rel=1e-6)


def test_teacher_pulls_and_stays_as_it_was():
    teacher = Net("bn").train()
    with torch.no_grad():
        teacher.fc.bias.add_(torch.tensor([9.0, 0.0, 0.0]))  # says class 0, whatever the labels
    before = weights(teacher)
    _, plain = train(val=(PAIR[0], torch.zeros(24, dtype=torch.long)), epochs=3, learning_rate=0.1)
    _, taught = train(
        val=(PAIR[0], torch.zeros(24, dtype=torch.long)),
        epochs=3,
        learning_rate=0.1,
        teacher=teacher,
        distillation_weight=1.0,
    )
    assert taught.epochs[-1].val_top1 == 1.0 > plain.epochs[-1].val_top1
    assert teacher.training
    assert all(torch.equal(before[name], value) for name, value in weights(teacher).items())
    odd = nn.Sequential(nn.Flatten(), nn.Linear(64, 5))
    with pytest.raises(TrainingError, match="teacher: got 5 classes; need the model's 3"):
        train(teacher=odd)


def test_distillation_loss_is_the_papers_gradient_at_high_temperature():
    """For large T and zero-mean logits the gradient is (z − v)/(N·K) (Hinton et al., eq. 4)."""
    torch.manual_seed(0)
    student = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(4, 6, dtype=torch.float64)
    with torch.no_grad():
        student -= student.mean(1, keepdim=True)
        teacher -= teacher.mean(1, keepdim=True)
    distillation_loss(student, teacher, temperature=1e4).backward()
    torch.testing.assert_close(
        student.grad, (student.detach() - teacher) / 24, rtol=1e-3, atol=1e-5
    )


@pytest.mark.parametrize("mixing", [{"mixup": 0.4}, {"cutmix": 1.0}, {"mixup": 0.4, "cutmix": 1.0}])
def test_mixed_labels_and_an_odd_last_batch(mixing):
    _, history = train(data=samples(23), label_smoothing=0.1, **mixing)  # the last batch is of 3
    assert math.isfinite(history.epochs[0].train_loss)


def test_side_heads_are_trained():
    class Sided(Net):
        def __init__(self):
            super().__init__()
            self.side = nn.Linear(64, CLASSES)

        def forward(self, x):
            return (
                (super().forward(x), self.side(x.flatten(1)), None)
                if self.training
                else (super().forward(x))
            )

    model = Sided()
    before = weights(model)
    train(model)
    assert not torch.equal(before["side.weight"], model.side.weight)


@pytest.mark.parametrize("amp", ["bf16", None])
def test_mixed_precision_keeps_weights_in_fp32(amp):
    model, history = train(amp=amp)
    assert model.fc.weight.dtype == torch.float32
    assert math.isfinite(history.epochs[0].train_loss)
    assert "forward" not in vars(model)


def test_validation_under_mixed_precision_is_what_evaluate_measures():
    val = samples(30, seed=1)
    model, history = train(val=val, amp="bf16", keep="last")
    measured = evaluate(model, val)
    assert (history.epochs[-1].val_top1, history.epochs[-1].val_loss) == (
        measured.top1,
        measured.loss,
    )


def test_fp16_needs_a_gpu():
    with pytest.raises(TrainingError, match="'fp16' on the CPU"):
        train(amp="fp16", device="cpu")


def test_an_accelerator_of_the_caller_survives():
    from accelerate import Accelerator

    mine = Accelerator(cpu=True, gradient_accumulation_steps=3)
    train(amp="bf16")
    assert mine.mixed_precision == "no"
    assert mine.num_processes == 1
    assert mine.gradient_accumulation_steps == 3


def test_global_random_generators_are_the_callers():
    torch.manual_seed(5)
    expected = torch.rand(3)
    model, data = Net(), Augmented(8)  # both seed torch
    torch.manual_seed(5)
    train(model, data)
    assert torch.equal(expected, torch.rand(3))


SCHEDULERS = ["cosine", "step", "multistep", "poly", "constant", "none"]
if "wsd" in inspect.getsource(scheduler_factory):  # timm 1.0.31 has it
    SCHEDULERS.append("wsd")


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_schedulers(scheduler, tmp_path):
    train(scheduler=scheduler, learning_rate=0.1, epochs=2, out=tmp_path, log_every=1, val=PAIR)
    rates = [row["learning_rate"] for row in read_metrics(tmp_path) if row["kind"] == "step"]
    assert all(0 <= rate <= 0.1 + 1e-12 for rate in rates)
    steady = scheduler in ("constant", "none")
    assert rates[-1] > 0.09 if steady else rates[-1] < 0.02


def test_warm_up_and_cosine_follow_their_formula(tmp_path):
    train(learning_rate=0.1, epochs=2, warmup_epochs=0.5, out=tmp_path, log_every=1)
    rates = [row["learning_rate"] for row in read_metrics(tmp_path) if row["kind"] == "step"]
    for step, rate in enumerate(rates, start=1):  # 12 updates, 3 of warm-up
        ramp = 0.001 + (0.1 - 0.001) * step / 3
        cosine = 0.05 * (1 + math.cos(math.pi * step / 12))
        assert rate == pytest.approx(ramp if step < 3 else cosine, rel=1e-6)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"optimizer": "nonsense"}, "FineTune.optimizer: got 'nonsense'"),
        ({"scheduler": "plateau"}, "FineTune.scheduler: got 'plateau', which timm"),
        ({"scheduler": "nonsense"}, "FineTune.scheduler: got 'nonsense'"),
        ({"batch_size": 0}, "FineTune.batch_size: got 0; need an integer ≥ 1"),
        ({"batch_size": 2.0}, "FineTune.batch_size"),
        ({"epochs": True}, "FineTune.epochs"),
        ({"learning_rate": 0.0}, "FineTune.learning_rate"),
        ({"warmup_epochs": 1.0}, "less than epochs=1"),
        ({"ema": 1.0}, "FineTune.ema"),
        ({"amp": "fp8"}, "FineTune.amp"),
        ({"keep": "worst"}, "FineTune.keep"),
        ({"on_broken": "ignore"}, "FineTune.on_broken"),
        ({"freeze_backbone": True, "norms_only": True}, "one of the two"),
        ({"mixup": 0.2, "batch_size": 1}, "two samples to mix"),
        ({"distillation_temperature": 0.0}, "FineTune.distillation_temperature"),
        ({"label_smoothing": 1.5}, "FineTune.label_smoothing"),
    ],
)
def test_options_that_make_no_sense(changes, text):
    with pytest.raises(TrainingError, match=text):
        train(**changes)


def test_linear_rule():
    assert FineTune(optimizer="sgd").learning_rate_for(2) == pytest.approx(0.1 * 2 / 256)
    assert FineTune(optimizer="adamw").learning_rate_for(64) == pytest.approx(0.001)  # by the root
    assert FineTune(optimizer="adamw").learning_rate_for(16) == pytest.approx(0.0005)
    assert FineTune(learning_rate=0.3).learning_rate_for(2) == 0.3
    _, history = train(batch_size=2, gradient_accumulation=4, optimizer="sgd")
    assert history.learning_rate == pytest.approx(0.1 * 8 / 256)


# batches


@pytest.mark.parametrize(
    ("samples_", "batch", "world", "expected"),
    [
        (7, 2, 1, [2, 2, 2]),  # the last single sample is dropped
        (8, 3, 1, [3, 3, 2]),
        (3, 1, 1, [1, 1, 1]),
        (1, 4, 1, [1]),  # nothing else to train on
        (10, 4, 2, [4]),  # a rest of one per process is dropped
        (12, 4, 2, [4, 2]),
        (7, 1, 2, [1, 1, 1]),
        (1, 1, 2, []),
    ],
)
def test_batches_of_an_epoch(samples_, batch, world, expected):
    dealt = [slices(samples_, batch, Share(rank, world)) for rank in range(world)]
    assert all([end - begin for begin, end in item] == expected for item in dealt)
    used = sorted(i for item in dealt for begin, end in item for i in range(begin, end))
    assert used == sorted(set(used))
    assert all(i < samples_ for i in used)


def test_every_epoch_has_its_own_order():
    orders = [epoch_order(50, seed, epoch).tolist() for seed in (0, 1) for epoch in (0, 1)]
    assert all(sorted(order) == list(range(50)) for order in orders)
    assert len({tuple(order) for order in orders}) == 4


def test_last_batch_of_one_does_not_stop_bn_on_one_pixel():
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 4), nn.BatchNorm1d(4), nn.Linear(4, CLASSES))
    for data in (samples(7), Augmented(7), DataLoader(Augmented(7), batch_size=2)):
        _, history = train(model, data, batch_size=2)
        assert history.steps == 3
    with pytest.raises(TrainingError, match=r"one value per channel at batch_size=1.*gn, frn"):
        train(model, batch_size=1)


def test_own_loader_keeps_its_batch_size_and_order():
    class Seen(Net):
        def forward(self, x):
            seen.append(x.clone())
            return super().forward(x)

    seen = []
    train(Seen(), DataLoader(TensorDataset(*PAIR), batch_size=6), batch_size=2)
    seen = [item for item in seen if len(item) > 1]  # without the first look
    assert torch.equal(torch.cat(seen), PAIR[0])
    assert {len(item) for item in seen} == {6}


def test_stream_of_samples():
    class Stream(IterableDataset):
        def __len__(self):
            return 24

        def __iter__(self):
            return iter(TensorDataset(*PAIR))

    _, history = train(data=Stream())
    assert history.steps == 6

    class Endless(IterableDataset):
        def __iter__(self):
            return iter(TensorDataset(*PAIR))

    with pytest.raises(TrainingError, match="without a length"):
        train(data=Endless())


@pytest.mark.parametrize("workers", [0, 1])
def test_broken_samples_stop_or_are_replaced_and_counted(workers, caplog):
    data = Augmented(12, broken={3, 4, 9})
    with pytest.raises(DataError, match=r"sample \d+: got OSError: image \d+ is truncated"):
        train(data=data, workers=workers)
    _, history = train(data=data, val=data, workers=workers, on_broken="skip", epochs=2)
    assert history.broken == (3, 4, 9)
    assert history.steps == 6
    assert "3 samples could not be read" in caplog.text
    found = evaluate(Net(), data, on_broken="skip", workers=workers)
    assert (found.images, found.broken) == (9, 3)
    with pytest.raises(DataError, match="12 broken in a row"):
        train(data=Augmented(12, broken=set(range(12))), on_broken="skip")
    with pytest.raises(DataError, match="12 broken"):
        evaluate(Net(), Augmented(12, broken=set(range(12))), on_broken="skip")


def test_images_of_different_shapes():
    data = [(torch.zeros(1, 8, 8 + i), 0) for i in range(4)]
    with pytest.raises(DataError, match="different shapes in one batch"):
        train(data=data)


def test_images_that_are_no_tensors():
    with pytest.raises(DataError, match="an image of type str"):
        train(data=[("cat.png", 0)] * 4)


# faults


class Explodes(Net):
    """Its second convolution gives NaN from the third training forward on."""

    def __init__(self):
        super().__init__("bn")
        self.seen = 0
        self.conv2.register_forward_hook(self._spoil)

    def _spoil(self, _module, _inputs, output):
        self.seen += self.training
        return output * math.nan if self.seen > 2 and self.training else None


def test_loss_that_is_not_finite_names_step_and_layer(tmp_path):
    with pytest.raises(
        TrainingError,
        match=r"step 3: got a loss of nan, first seen in the output of conv2 \(Conv2d\).*"
        r"last good checkpoint is .*last\.pt",
    ):
        train(Explodes(), out=tmp_path, checkpoint_every=0)
    kept = torch.load(tmp_path / "last.pt", weights_only=True)
    assert kept["place"]["step"] == 2
    assert all(torch.isfinite(value).all() for value in kept["model"].values())


def test_images_that_are_not_finite():
    images = PAIR[0].clone()
    images[:] = math.inf
    with pytest.raises(TrainingError, match="first seen in the input images"):
        train(data=(images, PAIR[1]))


def test_out_of_memory_gives_advice():
    class Greedy(Net):
        def forward(self, x):
            if self.training:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
            return super().forward(x)

    with pytest.raises(TrainingError, match=r"memory at batch_size=4.*gradient_accumulation"):
        train(Greedy())


def test_other_errors_stay_what_they_are():
    class Wrong(Net):
        def forward(self, x):
            if self.training:
                raise RuntimeError("shapes do not match")
            return super().forward(x)

    with pytest.raises(RuntimeError, match="shapes do not match"):
        train(Wrong())


# schedules of the layers


def test_schedules_are_fitted_into_the_run():
    fresh = layers.BatchRenorm2d(2)
    trained = layers.BatchRenorm2d(2)
    trained.running_mean += 1
    short = layers.BatchRenorm2d(2, warmup=10, r_ramp=30, d_ramp=20)
    long = layers.BatchRenorm2d(2, warmup=1000, r_ramp=3000, d_ramp=2000)
    cbn = attached_cbn(nn.Conv2d(1, 2, 1), burn_in=1000)
    fresh_cbn = attached_cbn(nn.Conv2d(1, 2, 1))
    trained_cbn = attached_cbn(nn.Conv2d(1, 2, 1))
    trained_cbn.running_var += 1
    model = nn.ModuleList([fresh, trained, short, long, cbn, fresh_cbn, trained_cbn])
    scale_schedules(model, iterations=1300)
    assert (fresh.warmup, fresh.r_ramp, fresh.d_ramp) == (50, 350, 200)
    assert (trained.warmup, trained.r_ramp, trained.d_ramp) == (0, 0, 0)
    assert (short.warmup, short.r_ramp, short.d_ramp) == (10, 30, 20)
    assert (long.warmup, long.r_ramp, long.d_ramp) == (97, 292, 195)
    assert [norm.burn_in for norm in (cbn, fresh_cbn, trained_cbn)] == [390, 390, 0]


def test_sync_batch_norm_on_the_cpu_is_said(caplog):
    model = nn.SyncBatchNorm.convert_sync_batchnorm(Net("bn"))
    train(model, device="cpu")
    assert "norm1: SyncBatchNorm in one process on the CPU is plain BatchNorm" in caplog.text


def test_tensorboard_events_are_written_where_it_is_installed(tmp_path):
    pytest.importorskip("tensorboard")
    train(tensorboard=True, out=tmp_path)
    assert list((tmp_path / "tensorboard").glob("events.*"))


@pytest.mark.parametrize(
    ("norm", "given", "factor"),
    [
        ("gn", {}, 1),
        ("brn", {}, 1),
        ("frn", {}, 5),
        ("frn", {"optimizer": "lamb"}, 5),
        ("frn", {"optimizer": "sgd"}, 1),
        ("frn", {"learning_rate": 1e-4}, 1),
    ],
)
def test_frn_is_trained_faster_unless_a_rate_or_sgd_is_asked_for(norm, given, factor):
    options = FineTune(batch_size=4, epochs=1, **given)
    history = finetune(Net(norm), samples(8), options=options)
    assert history.learning_rate == pytest.approx(factor * options.learning_rate_for(4))


# --- running statistics ---------------------------------------------------------------------------


def momenta(model):
    return [m.momentum for m in model.modules() if isinstance(m, nn.BatchNorm2d)]


@pytest.mark.parametrize(
    ("batch", "given", "expected"),
    [(2, None, 1 - 0.9 ** (2 / 32)), (48, None, 0.1), (2, 0.3, 0.3), (2, 0.0, 0.0)],
)
def test_running_statistics_go_over_as_many_samples_as_in_batches_of_32(batch, given, expected):
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 2))
    data = (torch.randn(96, 1, 8, 8) + 2, torch.arange(96) % 2)
    seen = []
    recipe = FineTune(batch_size=batch, epochs=1, bn_momentum=given)
    finetune(net, data, options=recipe, progress=lambda _: seen.append(momenta(net)[0]))
    assert seen == [pytest.approx(expected)] * math.ceil(96 / batch)
    assert momenta(net) == [0.1]


def test_a_momentum_that_is_small_enough_stays():
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4, momentum=0.003), nn.Flatten())
    with steady_statistics(net, 2):
        assert momenta(net) == [0.003]


def test_a_momentum_comes_back_from_a_run_that_fails():
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 2))

    def stop(_):
        raise RuntimeError("enough")

    with pytest.raises(RuntimeError, match="enough"):
        finetune(net, (torch.randn(8, 1, 8, 8), torch.arange(8) % 2), progress=stop)
    assert momenta(net) == [0.1]


def test_no_momentum_stays_none():
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4, momentum=None), nn.Flatten())
    with steady_statistics(net, 2):
        assert momenta(net) == [None]


@pytest.mark.parametrize("target", ["gn", "frozen"])
def test_a_momentum_without_statistics_that_move_is_refused(target):
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 2))
    model = convert(net, target, example_inputs=torch.zeros(2, 1, 8, 8)).model
    data = (torch.randn(8, 1, 8, 8), torch.arange(8) % 2)
    with pytest.raises(TrainingError, match=r"without running statistics.*--bn-momentum"):
        finetune(model, data, options=FineTune(epochs=1, bn_momentum=0.01))
