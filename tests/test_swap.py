from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
import traps
from timm.layers import BatchNormAct2d, FrozenBatchNormAct2d, SyncBatchNormAct
from torch import nn
from torchvision.ops import FrozenBatchNorm2d
from traps import TRAPS, built

import normswap
from normswap.errors import NormSwapError, SwapError, WalkError
from normswap.graph.recorder import recording
from normswap.targets import TARGETS

EXACT = ("brn", "cbn", "naive-cbn", "frozen", "bn", "syncbn")


def run(model, inputs):
    with torch.no_grad():
        return model(inputs)


def leaves(output):
    return output if isinstance(output, tuple) else (output,)


def relus(model, inputs):
    """How many ReLUs run in one forward, of any form."""
    with recording({m: n for n, m in model.named_modules()}) as recorder, torch.no_grad():
        model(inputs)
    return sum(call.op == "relu" for call in recorder.trace.calls)


def tlus(model):
    return sum(name.endswith("tau") for name, _ in model.named_parameters())


@pytest.mark.parametrize("target", EXACT)
@pytest.mark.parametrize("name", TRAPS)
def test_targets_with_statistics_are_exact_in_eval(name, target):
    trap = TRAPS[name]
    model = built(name)
    expected = run(model, trap.inputs)
    keys = list(model.state_dict())
    result = normswap.convert(model, target, example_inputs=trap.inputs)
    assert torch.equal(run(result.model, trap.inputs), expected)
    # "listed" names of an alias are one module; BN's own keys are BN's own keys
    assert list(result.model.state_dict()) == keys
    assert (result.model is model) == (name != "root" or not result.replaced)
    back = normswap.convert(result.model, "bn", example_inputs=trap.inputs).model
    assert torch.equal(run(back, trap.inputs), expected)
    kinds = {type(m) for m in built(name).modules()}
    assert {type(m) for m in back.modules()} == kinds


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", TRAPS)
def test_converted_models_copy_pickle_and_train(name, target):
    trap = TRAPS[name]
    result = normswap.convert(built(name), target, example_inputs=trap.inputs)
    expected = run(result.model, trap.inputs)
    for twin in (copy.deepcopy(result.model), pickle.loads(pickle.dumps(result.model))):
        assert torch.equal(run(twin, trap.inputs), expected)
        if target == "syncbn":
            continue
        twin.train()
        sum(out.sum() for out in leaves(twin(trap.inputs))).backward()
        sum(out.sum() for out in leaves(twin(trap.inputs))).backward()
        twin.eval()
        run(twin, trap.inputs)
    assert torch.equal(run(result.model, trap.inputs), expected)


@pytest.mark.parametrize("name", TRAPS)
def test_frn_with_the_relu_taken_equals_frn_with_the_relu_kept(name):
    trap = TRAPS[name]
    taken = normswap.convert(built(name), "frn", example_inputs=trap.inputs).model
    kept = normswap.convert(
        built(name), normswap.FilterResponseNorm(tlu=False), example_inputs=trap.inputs
    ).model
    assert torch.equal(run(taken, trap.inputs), run(kept, trap.inputs))
    assert relus(taken, trap.inputs) + _tlu_calls(name) == relus(kept, trap.inputs)
    assert tlus(kept) == 0


def _tlu_calls(name):
    """Every TLU of the traps runs once, and only in the modes in which its site runs."""
    plan = normswap.plan(built(name), "frn", example_inputs=TRAPS[name].inputs)
    removed = [e for e in plan if e.removal and "training mode only" not in " ".join(e.notes)]
    return len(removed)


def test_negative_tau_is_alive_after_the_relu_is_taken():
    """A ReLU left behind would clip it."""
    for name, trap in TRAPS.items():
        model = normswap.convert(built(name), "frn", example_inputs=trap.inputs).model
        taus = [p for n, p in model.named_parameters() if n.endswith("tau")]
        if not taus or name in {"training head", "reused relu", "shared slot"}:
            # their last operation is another ReLU
            continue
        for tau in taus:
            tau.data.fill_(-5.0)
        assert run(model, trap.inputs).min() < 0, name


def test_rewritten_block_is_still_itself():
    model = built("functional relu")
    keys = list(model.state_dict())
    normswap.convert(model, "frn", example_inputs=torch.randn(2, 3, 8, 8))
    assert isinstance(model, traps.Functional)
    assert type(model).__name__ == "Functional"
    assert type(model).forward.__doc__ == traps.Functional.forward.__doc__
    assert type(model).forward.__defaults__ == (0.0,)
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(model.eval()(x, extra=1.0), model(x) + 1.0)
    # the line after the ReLU that only training runs is still there
    model.bn = nn.Identity()
    assert torch.equal(model.train()(x), model.eval()(x) * 2)
    assert [k for k in model.state_dict() if "bn" not in k] == [k for k in keys if "bn" not in k]
    assert type(copy.deepcopy(model)) is type(model)
    assert type(pickle.loads(pickle.dumps(model))) is type(model)


def test_rewritten_block_can_be_walked_and_exported():
    model = traps.ReusedReLU().eval()
    x = torch.randn(2, 3, 8, 8)
    normswap.convert(model, "frn", example_inputs=x, include="bn1")
    site = normswap.walk(model, x)["bn2"]
    assert site.activation is None
    exported = torch.export.export(model, (x,))
    assert exported.module()(x).allclose(model(x), atol=1e-6)


def test_shared_relu_in_a_sequential_keeps_its_other_place():
    model = built("shared slot")
    normswap.convert(model, "frn", example_inputs=torch.randn(2, 3, 8, 8))
    assert isinstance(model[2], nn.Identity)
    assert isinstance(model[4], nn.ReLU)


def test_fused_dropout_stays_between_norm_and_activation():
    model = built("fused drop")
    normswap.convert(model, "frn", example_inputs=torch.randn(2, 3, 8, 8))
    assert isinstance(model[1].drop, nn.Dropout)
    assert isinstance(model[1].act, normswap.layers.ThresholdedLinearUnit)
    for target in ("gn", "brn", "cbn", "frozen", "syncbn"):
        model = built("fused drop")
        drop, act = model[1].drop, model[1].act
        normswap.convert(model, target, example_inputs=torch.randn(2, 3, 8, 8))
        assert model[1].drop is drop
        assert model[1].act is act


@pytest.mark.parametrize(
    ("norm", "plain"),
    [
        (FrozenBatchNorm2d, nn.BatchNorm2d),
        (FrozenBatchNormAct2d, BatchNormAct2d),
        (nn.SyncBatchNorm, nn.BatchNorm2d),
        (normswap.layers.FrozenBatchNorm2d, nn.BatchNorm2d),
        (normswap.layers.BatchRenorm2d, nn.BatchNorm2d),
    ],
)
def test_other_batchnorms_are_sources_too(norm, plain):
    torch.manual_seed(0)
    model = traps.randomise(nn.Sequential(nn.Conv2d(3, 4, 3), norm(4))).eval()
    x = torch.randn(2, 3, 8, 8)
    expected = run(model, x)
    scale = expected.abs().max()
    for target in ("gn", "frn", "brn", "frozen", "cbn", "bn", "syncbn"):
        result = normswap.convert(copy.deepcopy(model), target, example_inputs=x)
        output = run(result.model, x)
        if target not in {"gn", "frn"}:
            assert (output - expected).abs().max() <= 1e-6 * scale
        if target == "bn":
            assert type(result.model[1]) is plain


def test_sync_source_with_activation():
    from timm.layers import convert_sync_batchnorm

    fused = convert_sync_batchnorm(nn.Sequential(nn.Conv2d(3, 4, 3), BatchNormAct2d(4))).eval()
    assert isinstance(fused[1], SyncBatchNormAct)
    x = torch.randn(2, 3, 8, 8)
    expected = run(fused, x)
    result = normswap.convert(fused, "brn", example_inputs=x)
    assert torch.equal(run(result.model, x), expected)


def test_nothing_selected_changes_nothing():
    model = built("reused relu")
    x = torch.randn(2, 3, 8, 8)
    expected, parts = run(model, x), list(model.modules())
    result = normswap.convert(model, "frn", example_inputs=x, exclude="*")
    assert result.replaced == {}
    assert set(result.kept) == {"bn1", "bn2"}
    assert torch.equal(run(model, x), expected)
    assert all(a is b for a, b in zip(parts, model.modules(), strict=True))


def snapshot(model, optimizer):
    return (
        [
            (n, id(m), type(m), dict(vars(m)))
            for n, m in model.named_modules(remove_duplicate=False)
        ],
        [{k: list(v) for k, v in vars(m).items() if isinstance(v, dict)} for m in model.modules()],
        {k: (id(v), v.clone()) for k, v in model.state_dict(keep_vars=True).items()},
        [[id(p) for p in g["params"]] for g in optimizer.param_groups],
        {id(p): {k: id(v) for k, v in s.items()} for p, s in optimizer.state.items()},
    )


def same(before, after):
    for old, new in zip(before[2].values(), after[2].values(), strict=True):
        assert old[0] == new[0]
        assert torch.equal(old[1], new[1])
    assert [b[:3] for b in before[0]] == [a[:3] for a in after[0]]
    for old, new in zip(before[0], after[0], strict=True):
        assert {k: id(v) for k, v in old[3].items()} == {k: id(v) for k, v in new[3].items()}
    assert before[1] == after[1]
    assert before[3:] == after[3:]


class Everything(nn.Module):
    def __init__(self):
        super().__init__()
        self.parts = nn.ModuleList(
            (
                traps.ReusedReLU(),
                traps.ReusedReLU(),
                traps.Loop(),
                traps.Alias(),
                traps.Functional(),
            )
        )
        self.tail = traps.fused()()

    def forward(self, x):
        return [part(x) for part in self.parts], self.tail(x)


class FaultError(Exception):
    pass


@pytest.mark.parametrize("target", ["frn", "cbn", "gn"])
def test_a_fault_at_any_step_leaves_the_model_as_it_was(target):
    """Every line of the swap raises once; the model, its hooks and the optimizer come back."""
    import sys

    x = torch.randn(2, 3, 8, 8)
    torch.manual_seed(0)
    model = Everything()
    normswap.convert(model, "naive-cbn", example_inputs=x, include="tail.1")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    sum(out.sum() for out in model(x)[0]).backward()
    optimizer.step()
    plan = normswap.plan(model, target, example_inputs=x)
    before = snapshot(model, optimizer)
    code = normswap.swap.apply.apply_plan.__code__
    files = {code.co_filename.replace("apply.py", name) for name in ("apply.py", "references.py")}
    files |= {code.co_filename.replace("apply.py", n) for n in ("optimizer.py", "relu_removal.py")}
    steps = 0

    def tracer(frame, event, arg):
        nonlocal steps
        if frame.f_code.co_filename not in files:
            return None
        if event == "line":
            steps += 1
            if steps == fail_at:
                raise FaultError
        return tracer

    faults, fail_at = 0, 0
    while faults < 400:
        # every step at first, then wider apart: the swap has some thousand lines to run
        fail_at += 1 if fail_at < 60 else 7
        steps = 0
        sys.settrace(tracer)
        try:
            normswap.apply_plan(model, plan, optimizer=optimizer)
        except FaultError:
            faults += 1
        else:
            break
        finally:
            sys.settrace(None)
        same(before, snapshot(model, optimizer))
    assert faults >= 70


def test_hooks_on_the_norm_are_carried_over_and_can_still_be_removed():
    model = built("functional relu")
    x = torch.randn(2, 3, 8, 8)
    seen = []
    handle = model.bn.register_forward_hook(lambda m, a, o: seen.append(type(m).__name__))
    normswap.convert(model, "gn", example_inputs=x)
    seen.clear()
    run(model, x)
    assert seen == ["GroupNorm"]
    handle.remove()
    run(model, x)
    assert seen == ["GroupNorm"]


def test_plain_references_follow():
    model = built("alias")
    normswap.convert(model, "gn", example_inputs=torch.randn(2, 3, 8, 8))
    assert isinstance(model.bn, nn.GroupNorm)
    assert model.same is model.bn
    assert model.listed == [model.bn]


def test_wrapped_models_and_wrong_optimizers_are_refused():
    x = torch.randn(2, 3, 8, 8)
    with pytest.raises(WalkError, match=r"torch\.compile the result"):
        normswap.convert(torch.compile(built("fused relu")), "gn", example_inputs=x)
    model = built("fused relu")
    with pytest.raises(SwapError, match="optimizer"):
        normswap.convert(model, "gn", example_inputs=x, optimizer="sgd")
    assert isinstance(model[1], BatchNormAct2d)


def test_a_plan_for_another_model_is_refused():
    x = torch.randn(2, 3, 8, 8)
    plan = normswap.plan(built("fused relu"), "gn", example_inputs=x)
    with pytest.raises(SwapError, match="the plan was made for"):
        normswap.apply_plan(built("functional relu"), plan)
    with pytest.raises(SwapError, match="the plan was made for"):
        normswap.apply_plan(nn.Sequential(nn.Conv2d(3, 8, 3), BatchNormAct2d(8)), plan)


def test_a_plan_for_another_version_of_the_code_is_refused():
    x = torch.randn(2, 3, 8, 8)
    plan = normswap.plan(built("functional relu"), "frn", example_inputs=x)
    other = built("in-place relu")
    with pytest.raises(SwapError, match="another source"):
        normswap.apply_plan(other, plan)
    assert isinstance(other.bn, nn.BatchNorm2d)


@pytest.mark.parametrize("target", ["gn", "frn", "brn", "cbn", "frozen", "in"])
def test_optimizer_moves_and_trains_the_new_parameters(target):
    torch.manual_seed(0)
    model = built("functional relu").train()
    x = torch.randn(4, 3, 8, 8)
    norms = [model.bn.weight, model.bn.bias]
    optimizer = torch.optim.AdamW(
        [{"params": [model.conv.weight]}, {"params": norms, "weight_decay": 0.0}]
    )
    model(x).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    kept = dict(optimizer.state[model.conv.weight])
    weight_state = optimizer.state[model.bn.weight]
    normswap.convert(model, target, example_inputs=x, optimizer=optimizer)
    assert {id(p) for p in optimizer.param_groups[1]["params"]} == {
        id(p) for p in model.bn.parameters()
    }
    assert optimizer.param_groups[1]["weight_decay"] == 0.0
    assert optimizer.state[model.conv.weight] == kept
    shared = target in {"brn", "cbn", "frozen"}
    assert (optimizer.state.get(model.bn.weight) is weight_state) == shared
    assert len(optimizer.state) == (3 if shared else 1)
    before = model.bn.weight.detach().clone()
    model(x).square().sum().backward()
    optimizer.step()
    assert not torch.equal(before, model.bn.weight)


def test_cbn_wiring_survives_copy_state_dict_and_to():
    x = torch.randn(4, 3, 8, 8)
    model = normswap.convert(built("functional relu"), "cbn", example_inputs=x).model.train()
    twin = copy.deepcopy(model).to(torch.float64)
    twin.load_state_dict(model.state_dict())
    assert twin.bn.producer is twin.conv
    twin(x.double()).sum().backward()
    plain = built("functional relu")
    plain.load_state_dict(model.state_dict())
    with torch.no_grad():
        normswap.convert(model, "bn", example_inputs=x)
    assert not model.conv._forward_hooks


def test_meta_models_convert():
    for target in TARGETS:
        with torch.device("meta"):
            model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
        result = normswap.convert(model, target, example_inputs=torch.zeros(1, 3, 8, 8))
        assert all(p.is_meta for p in result.model.parameters())


def test_bf16_and_channels_last():
    x = torch.randn(2, 3, 8, 8).to(torch.bfloat16, memory_format=torch.channels_last)
    for target in ("gn", "frn", "brn", "cbn", "frozen"):
        model = built("reused relu").to(torch.bfloat16, memory_format=torch.channels_last)
        output = run(normswap.convert(model, target, example_inputs=x).model, x)
        assert output.dtype == torch.bfloat16
        assert output.isfinite().all()


def test_state_dict_keys_of_everything_else_are_unchanged():
    for target in TARGETS:
        for name, trap in TRAPS.items():
            model = built(name)
            sites = {n for k, a in trap.answers.items() for n in (a.names or (k,))}

            def others(m, norms=tuple(f"{n}." for n in sites)):
                return [k for k in m.state_dict() if not k.startswith(norms)]

            before = others(model) if name != "root" else []
            after = normswap.convert(model, target, example_inputs=trap.inputs).model
            assert (others(after) if name != "root" else []) == before


def test_converting_in_place_keeps_provenance():
    from normswap.provenance import provenance_of

    x = torch.randn(2, 3, 8, 8)
    model = normswap.convert(built("functional relu"), "cbn", example_inputs=x).model
    normswap.convert(model, "bn", example_inputs=x)
    assert [p["target"] for p in provenance_of(model).plans] == ["cbn", "bn"]


def test_saved_rewritten_module_refuses_another_source(monkeypatch):
    x = torch.randn(2, 3, 8, 8)
    model = normswap.convert(built("functional relu"), "frn", example_inputs=x).model
    data = io.BytesIO(pickle.dumps(model))
    monkeypatch.setattr("normswap.swap.relu_removal._generated", {})
    monkeypatch.setattr("normswap.swap.relu_removal._source", lambda base, method: None)
    with pytest.raises(NormSwapError, match="another source"):
        pickle.load(data)


def test_gradients_flow_through_a_taken_relu():
    x = torch.randn(2, 3, 8, 8)
    model = normswap.convert(built("reused relu"), "frn", example_inputs=x).model.train()
    F.mse_loss(model(x), x).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
