"""Damaged and hostile files end in one of the exit codes and one line, without a traceback.

Seeded. The default is short; ``NORMSWAP_FUZZ=long`` makes 2,000 artefacts, 1,000 checkpoints, 500
plans and 500 files of runs and sweeps (with ``-n 0 --timeout 0``).
"""

import copy
import io
import json
import pickle
import random
import shutil
import warnings
from contextlib import redirect_stderr
from pathlib import Path

import fuzz_length
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save, save_file
from torch import nn

import normswap
from normswap.artifact import record
from normswap.cli.app import app
from normswap.cli.boundary import exit_code
from normswap.cli.convert import read_plan
from normswap.files import content_digest, file_digest, json_digest
from normswap.sweeps import sweep
from normswap.tour import digits_net
from normswap.training.records import read_metrics

TOUR = "python:normswap.tour:digits_net"
HEARD = {}


def count(most):
    return fuzz_length.count(most, max(4, round(most * 0.02)))


@pytest.fixture(autouse=True)
def quick(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for room in ("normswap.training.loop.draw_learning_curve", "normswap.sweeps.draw_sweep"):
        monkeypatch.setattr(room, lambda *_args, **_more: None)  # most of the time, else
    yield
    torch.set_num_threads(threads)


# ------------------------------------------------------------------------------------- mutations

DEEP = "[" * 5000 + "]" * 5000
WORDS = (
    *("", "x", "bn1", "__class__", "forward", "weight", "os.system", "timm/resnet18", "../../x"),
    *("python:os:system", "python:evil:f", "hf-hub:a/b", "\x00", "\x1b[2J", "é" * 50, "9" * 400),
    *("float16", "meta", "cuda", "NaN", "null", "-1", "a\nb", "model.safetensors", "bn", "gn"),
)
NUMBERS = (-1, 0, 1, 2, 3, 7, 64, 1 << 31, 1 << 63, -(1 << 63), 1 << 80, 0.5, -0.5, 1e-300, 1e300)
ODD = (float("nan"), float("inf"), -float("inf"), None, True, False)


MAKERS = (
    lambda rng: rng.choice(WORDS),
    lambda rng: rng.choice(NUMBERS),
    lambda rng: rng.choice(ODD),
    lambda rng: [value(rng) for _ in range(rng.randrange(4))],
    lambda rng: {rng.choice(WORDS): value(rng) for _ in range(rng.randrange(4))},
    lambda rng: [],
    lambda rng: {},
)


def value(rng):
    """Anything that JSON can say."""
    return rng.choice(MAKERS)(rng)


def places(tree, path=()):
    """The path of everything in a tree of dicts, lists and tuples."""
    yield path
    items = tree.items() if isinstance(tree, dict) else enumerate(tree)
    for key, inner in items:
        if isinstance(inner, dict | list | tuple):
            yield from places(inner, (*path, key))
        else:
            yield (*path, key)


def mutated(tree, rng, make=value):
    """A copy with one to three things replaced, removed, doubled, renamed or exchanged."""
    tree = copy.deepcopy(tree)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        known = [path for path in places(tree) if path]
        if not known:
            break
        depth = rng.randrange(
            1, 1 + max(map(len, known))
        )  # fields near the root as often as leaves
        path = rng.choice([p for p in known if len(p) <= depth])
        tree = _changed(tree, path, rng, make)
    return tree


def _changed(tree, path, rng, make):
    key, *rest = path
    if isinstance(tree, tuple):
        return tuple(_changed(list(tree), path, rng, make))
    if rest:
        tree[key] = _changed(tree[key], rest, rng, make)
        return tree
    choice = rng.randrange(6)
    if choice == 0:
        del tree[key]
    elif choice == 1 and isinstance(tree, list):
        tree.insert(key, copy.deepcopy(tree[key]))
    elif choice == 1:
        tree[rng.choice(WORDS)] = tree.pop(key)
    elif choice == 2:
        other = rng.choice(list(tree) if isinstance(tree, dict) else range(len(tree)))
        tree[key], tree[other] = tree[other], tree[key]
    else:
        tree[key] = make(rng)
    return tree


def damaged(data, rng):
    """Bytes flipped, cut away, doubled or replaced by others."""
    data = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 8))):
        at, length = rng.randrange(len(data) + 1), rng.choice((1, 1, 4, 64, 4096))
        kind = rng.randrange(4)
        if kind == 0:
            data[at : at + length] = rng.randbytes(len(data[at : at + length]))
        elif kind == 1:
            del data[at:]
        elif kind == 2:
            del data[at : at + length]
        else:
            data[at:at] = data[at : at + length]
        if not data:
            break
    return bytes(data)


def ended(run, what):
    """How the command line would have ended; each kind of line is kept to be looked at."""
    stderr = io.StringIO()
    with redirect_stderr(stderr), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        code = exit_code(run, debug=False)
    text = stderr.getvalue()
    assert code in (0, 1, 2, 3), (what, code, text)
    assert "Unexpected" not in text, (what, text)
    assert text.count("\n") <= 1, (what, text)
    if code:
        assert text.strip().isprintable(), (what, text)
    HEARD.setdefault(what, []).append(code)
    return code


# ------------------------------------------------------------------------------------- artefacts


@pytest.fixture(scope="module")
def artefact(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fuzz") / "model"
    torch.manual_seed(0)
    source = normswap.load_model("timm/test_resnet", pretrained=False, num_classes=3, image_size=32)
    x = source.example_inputs(2)
    names = [site.names[0] for site in normswap.walk(source.model, x)]
    targets = dict(zip(names, ("frn", "gn", "cbn", "brn", "frozen") * 9, strict=False))
    result = normswap.convert(source.model, targets, example_inputs=x)
    normswap.save(result.model, folder, class_names=["a", "b", "c"])
    return folder


def signed(document):
    try:
        document["record_sha256"] = record.record_digest(document)
        return json.dumps(document)
    except (TypeError, ValueError):
        return json.dumps(document, default=str)


def test_artefacts(artefact, tmp_path):
    rng = random.Random(20)
    good = json.loads((artefact / record.RECORD).read_text())
    weights = (artefact / record.WEIGHTS).read_bytes()
    tensors = load_file(artefact / record.WEIGHTS)
    folder = tmp_path / "model"
    shutil.copytree(artefact, folder)
    for number in range(count(2000)):
        document, content = copy.deepcopy(good), weights
        if number % 4 < 3:
            document = mutated(document, rng)
        if number % 4 == 3:
            content = damaged(weights, rng) if rng.random() < 0.5 else save(other(tensors, rng))
        if isinstance(document, dict):
            if content is not weights:
                (folder / record.WEIGHTS).write_bytes(content)
                document["sha256"] = file_digest(folder / record.WEIGHTS)
            text = signed(document)
        if number % 50 == 49:
            text = rng.choice((DEEP, text[: rng.randrange(len(text))], "\ud800", '{"a":1}', "3"))
        (folder / record.RECORD).write_text(text, encoding="utf-8", errors="surrogatepass")
        if number % 40:
            ended(lambda: normswap.load_model(folder) and None, "artefact")
        else:
            result = CliRunner().invoke(app, ["inspect", str(folder)])
            assert result.exit_code in (0, 1, 2), (number, result.output)
            assert "Unexpected" not in result.stderr, (number, result.stderr)
        (folder / record.WEIGHTS).write_bytes(weights)
    print("artefacts", tally("artefact"))  # noqa: T201


def other(tensors, rng):
    """Tensors of other shapes, types and names."""
    changed = dict(tensors)
    name = rng.choice(list(tensors))
    kind = rng.randrange(5)
    tensor = changed.pop(name)
    if kind == 0:
        changed[rng.choice(WORDS)] = tensor
    elif kind == 1:
        changed[name] = tensor.flatten()[:1].clone()
    elif kind == 2:
        changed[name] = tensor.to(torch.int64)
    elif kind == 3:
        changed[name] = torch.full_like(tensor.float(), float("nan"))
    return changed


def tally(what):
    codes = HEARD.get(what, [])
    return {code: codes.count(code) for code in sorted(set(codes))}


# ----------------------------------------------------------------------------------- checkpoints


def leaf(rng):
    """What a pickle of tensors may hold besides JSON's types."""
    kind = rng.randrange(6)
    if kind == 0:
        return torch.zeros(rng.choice(((), (1,), (16,), (3, 0), (16, 1, 3, 3))))
    if kind == 1:
        return torch.tensor([float("nan")], dtype=rng.choice((torch.float16, torch.float64)))
    if kind == 2:
        return torch.Size([1, 2])
    if kind == 3:
        return {"state_dict": value(rng), 3: torch.zeros(2), None: 1}
    return value(rng)


def cyclic(rng):
    inner = {}
    inner[rng.choice(("model", "state_dict", "self"))] = inner
    return inner


def deep(rng):
    """A pickle of mappings in mappings, written by hand: pickle itself cannot."""
    levels, name = rng.choice((900, 20_000)), rng.choice((b"model", b"state_dict", b"x"))
    key = b"X" + len(name).to_bytes(4, "little") + name
    return b"\x80\x02" + (b"}" + key) * levels + b"}" + b"s" * levels + b"."


def test_checkpoints(tmp_path):
    rng = random.Random(21)
    torch.manual_seed(0)
    state = digits_net().state_dict()
    save_file(state, tmp_path / "good.safetensors")
    torch.save({"state_dict": state, "epoch": 3}, tmp_path / "good.pth")
    torch.save(state, tmp_path / "legacy.pth", _use_new_zipfile_serialization=False)
    (tmp_path / "bare.bin").write_bytes(pickle.dumps({"model": {"x": [1, 2]}}))
    good = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    for number in range(count(1000)):
        name = rng.choice(list(good))
        path = tmp_path / f"bad{Path(name).suffix}"
        if number % 3:
            path.write_bytes(damaged(good[name], rng))
        else:
            content = mutated({"state_dict": dict(state), "epoch": 3}, rng, leaf)
            content = cyclic(rng) if number % 30 == 0 else content
            torch.save(content, path, _use_new_zipfile_serialization=rng.random() < 0.7)
        if number % 30 == 1:
            path.write_bytes(deep(rng))
        ended(lambda at=path: normswap.load_model(TOUR, checkpoint=at) and None, "checkpoint")
    print("checkpoints", tally("checkpoint"))  # noqa: T201


# ----------------------------------------------------------------------------------------- plans


def test_plans(tmp_path):
    rng = random.Random(22)
    x = torch.zeros(2, 1, 8, 8)
    targets = ["frn", "gn", "cbn", "brn", "frozen"]
    plans = [normswap.plan(digits_net(), t, example_inputs=x).to_json() for t in targets]
    path = tmp_path / "plan.json"
    for number in range(count(500)):
        text = json.dumps(mutated(rng.choice(plans), rng))
        if number % 20 == 19:
            text = rng.choice(
                (DEEP, text[: rng.randrange(len(text))], "[]", "null", '{"entries":3}')
            )
        path.write_text(text)
        model = digits_net()
        before = [(name, type(module)) for name, module in model.named_modules()]

        def convert(model=model):
            normswap.convert(model, read_plan(path))

        if ended(convert, "plan"):
            assert [(name, type(module)) for name, module in model.named_modules()] == before
    print("plans", tally("plan"))  # noqa: T201


# ------------------------------------------------------------------------------- runs and sweeps


def net():
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv2d(1, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3)),
        *(normswap.layers.BatchRenorm2d(4), nn.Flatten(), nn.Linear(16, 2)),
    )
    return normswap.convert(model, {"1": "gn"}, example_inputs=DATA[0]).model


DATA = (torch.arange(96.0).reshape(6, 1, 4, 4) / 96, torch.arange(6) % 2)
OPTIONS = {"batch_size": 2, "epochs": 2, "tensorboard": False, "keep": "best", "device": "cpu"}
OPTIONS |= {"passage": 0.9}


def resumed(folder, epochs=2):
    options = normswap.FineTune(**OPTIONS | {"epochs": epochs})
    normswap.finetune(net(), DATA, DATA, options, out=folder, resume=True)


@pytest.fixture(scope="module")
def halfway(tmp_path_factory):
    """A run that was broken off in the middle of its second epoch."""
    folder = tmp_path_factory.mktemp("fuzz-run") / "run"

    def stop(now):
        if now.step == 4:
            raise KeyboardInterrupt

    options = normswap.FineTune(**OPTIONS, checkpoint_every=0)
    with pytest.raises(KeyboardInterrupt):
        normswap.finetune(net(), DATA, DATA, options, out=folder, progress=stop)
    assert (folder / "last.pt").exists()
    return folder


def sealed(state):
    """With the hash that belongs to it, so that the content is looked at, too."""
    if isinstance(state, dict):
        state = {key: value for key, value in state.items() if key != "sha256"}
        state["sha256"] = content_digest(state)
    return state


def same_state(data, good):
    """Whether a damaged file still holds what the good one does."""
    try:
        state, own = (torch.load(io.BytesIO(d), weights_only=True) for d in (data, good))
        return content_digest(state) == content_digest(own)
    except Exception:  # noqa: BLE001 - it is damaged
        return False


def test_runs(halfway, tmp_path):
    rng = random.Random(23)
    names = ("last.pt", "best.pt", "metrics.jsonl")
    good = {name: (halfway / name).read_bytes() for name in names}
    for number in range(count(300)):
        folder = tmp_path / "run"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(halfway, folder)
        name = names[number % 3]
        signed_anew = name != "metrics.jsonl" and number % 8 < 5
        if name == "metrics.jsonl" or number % 8 == 7:
            content = damaged(good[name], rng)
        else:
            state = mutated(torch.load(halfway / name, weights_only=True), rng, leaf)
            file = io.BytesIO()
            torch.save(sealed(state) if signed_anew else state, file)
            content = file.getvalue()
        if name == "metrics.jsonl" and number % 2:
            content += rng.choice((b"[1]\n", b"3\n", b'{"step":"x"}\n', b"\xff\n", DEEP.encode()))
        (folder / name).write_bytes(content)
        code = ended(lambda at=folder: resumed(at), name)
        if name != "metrics.jsonl" and not signed_anew and not same_state(content, good[name]):
            assert code, "changed content was believed"
        ended(lambda at=folder: read_metrics(at) and None, "metrics read")
    print("runs", {name: tally(name) for name in names})  # noqa: T201


def test_sweeps(tmp_path):
    rng = random.Random(24)
    options = normswap.FineTune(epochs=1, batch_size=2, tensorboard=False, device="cpu")
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 2))

    def swept(folder):
        sweep(model, DATA, DATA, targets=["bn", "gn"], batch_sizes=[2], seeds=1,
              options=options, out=folder)  # fmt: skip

    swept(tmp_path / "good")
    names = ["settings.json", "cells/bn-b2-s0.json", "cells/gn-b2-s0.json", "sweep.json"]
    good = {name: (tmp_path / "good" / name).read_text() for name in names}
    for number in range(count(200)):
        folder = tmp_path / "sweep"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(tmp_path / "good", folder)
        name = names[number % 3]
        data = mutated(json.loads(good[name]), rng)
        anew = number % 8 < 6
        if anew and name != "settings.json" and isinstance(data, dict):
            data["sha256"] = json_digest(data)
        text = json.dumps(data).encode()
        if number % 4 == 3:
            text = rng.choice((DEEP.encode(), damaged(good[name].encode(), rng), b"[]", b"\xff"))
        (folder / name).write_bytes(text)
        code = ended(lambda at=folder: swept(at), name)
        if not anew and name != "settings.json" and number % 4 < 3:
            assert code or data == json.loads(good[name]), "changed content was believed"
    print("sweeps", {name: tally(name) for name in names})  # noqa: T201
