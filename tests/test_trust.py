"""What somebody else made never imports or calls anything that it names, whatever file it is.

The canaries: modules in the current folder that leave a file when they are imported, pickles that
leave a folder, and an audit hook that hears of every command, deletion and connection.
"""

import contextlib
import copy
import json
import os
import pickle
import re
import shutil
import subprocess
import sys

import onnx
import PIL.Image
import pytest
import torch
from click.testing import CliRunner
from torch import nn

import normswap
from normswap import files, sources, trust
from normswap.artifact import record
from normswap.cli.app import app
from normswap.errors import ArtifactError, NormSwapError, SpecError, TrainingError
from normswap.onnx.file.identity import metadata_hash
from normswap.planning import Plan
from normswap.sweeps import sweep

SPEC = "timm/test_resnet"
TOUR = "python:normswap.tour:digits_net"

DANGEROUS = (
    *("os.system", "os.exec", "os.posix_spawn", "os.spawn", "subprocess.Popen", "pty.spawn"),
    *("shutil.rmtree", "os.rmdir", "os.remove", "socket.connect", "socket.getaddrinfo"),
    *("urllib.Request", "webbrowser.open", "code.__new__", "ctypes.dlopen"),
)

OWN_LOCK = re.compile(r"\.[\w.-]+\.lock")  # a writer takes its own away

heard = []
listening = False


def _hear(event, arguments):
    own_lock = event == "os.remove" and OWN_LOCK.fullmatch(str(arguments[0]).rpartition("/")[2])
    if listening and event.startswith(DANGEROUS) and not own_lock:
        heard.append((event, arguments))
    if listening and event == "import" and arguments and arguments[0] in ("evilmod", "evilpack"):
        heard.append((event, arguments))


sys.addaudithook(_hear)  # it cannot be taken away again, so that it listens only when told


@contextlib.contextmanager
def nothing_may_run():
    global listening
    heard.clear()
    listening = True
    try:
        yield
    finally:
        listening = False
    assert heard == []


@pytest.fixture(scope="module")
def artefact(tmp_path_factory):
    """One converted network; opened once, so that what a command imports is imported."""
    folder = tmp_path_factory.mktemp("trust") / "good"
    torch.manual_seed(0)
    source = normswap.load_model(SPEC, pretrained=False, num_classes=3, image_size=32)
    x = source.example_inputs(2)
    model = normswap.convert(source.model, "frn", example_inputs=x).model
    normswap.save(model, folder)
    assert CliRunner().invoke(app, ["inspect", str(folder)]).exit_code in (0, 1)
    normswap.load(folder)
    return folder


@pytest.fixture
def folder(artefact, tmp_path, monkeypatch):
    """A copy of it, in a current folder full of canaries."""
    here = tmp_path / "here"
    shutil.copytree(artefact, here / "model")
    canary = "import pathlib\npathlib.Path('ran').touch()\ndef f(**k):\n    raise SystemExit(7)\n"
    (here / "evilmod.py").write_text(canary)
    (here / "evilpack").mkdir()
    (here / "evilpack" / "__init__.py").write_text(canary)
    (here / "data").mkdir()
    monkeypatch.chdir(here)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    yield here
    for name in ("evilmod", "evilpack"):
        sys.modules.pop(name, None)


def untouched(here):
    return sorted(path.name for path in here.iterdir()) == [
        "data",
        "evilmod.py",
        "evilpack",
        "model",
    ]


def rewrite(model, **changes):
    """Change fields and make the record agree with itself again, as an attacker would."""
    path = model / record.RECORD
    document = {**json.loads(path.read_text()), **changes}
    document["record_sha256"] = record.record_digest(document)
    path.write_text(json.dumps(document))


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def assert_refused(result):
    assert result.exit_code in (1, 2), result.output
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1, result.stderr
    assert "Unexpected" not in lines[0], lines[0]
    assert lines[0].isprintable(), lines[0]
    assert "Try " in lines[0], lines[0]


# ---------------------------------------------------------------------------- hostile sources

SHELL = {"cmd": "touch ran"}
SOURCES = [
    # those of the first attack
    ("python:torch:os.popen", SHELL),
    ("python:torch.hub:os.popen", SHELL),
    ("python:torch.utils.cpp_extension:subprocess.Popen", {"args": ["touch", "ran"]}),
    ("python:torch.hub:load", {"repo_or_dir": ".", "model": "f", "source": "local"}),
    ("python:torch:load", {"f": "model/evil.pth", "weights_only": False}),
    ("python:numpy:load", {"file": "model/evil.npy", "allow_pickle": True}),
    ("python:torch.hub:shutil.rmtree", {"path": "data"}),
    ("python:evilmod:f", {}),
    ("hf-hub:evil/repo", {}),
    # through other doors
    ("python:evilmod:f", {"image_size": 32}),
    ("python:evilpack:f", {}),
    ("python:evilpack.inner:f", {}),
    ("python:normswap.tour:os.popen", SHELL),
    ("python:normswap.children:os.execvp", {}),
    ("python:normswap.factories.python_models:importlib.import_module", {"name": "evilmod"}),
    ("python:normswap.libraries:library", {"name": "evilmod"}),
    ("python:normswap.sources:build", {"spec": "python:evilmod:f"}),
    ("python:normswap:load", {"directory": "model"}),
    ("python:normswap:load_model", {"spec": "python:evilmod:f"}),
    (TOUR, {"num_classes": 3, "cmd": "x"}),
    ("python:normswap.tour:run_tour", {"folder": "data"}),
    ("python:torch.serialization:load", {"f": "model/evil.pth"}),
    ("python:torch.package:PackageImporter", {"file": "x"}),
    ("python:torch.jit:load", {"f": "x"}),
    ("python:torch.ops:load_library", {"path": "./evil.so"}),
    ("python:torch.utils.model_zoo:load_url", {"url": "http://127.0.0.1/x"}),
    ("python:torch.distributed.run:main", {"args": ["evilmod.py"]}),
    ("python:torch.multiprocessing:spawn", {}),
    ("python:torch._dynamo:config", {}),
    ("python:timm.models:create_model", {"model_name": "hf-hub:evil/repo"}),
    ("python:timm:create_model", {"model_name": "local-dir:data"}),
    ("python:torchvision.models:get_model", {"name": "resnet18", "weights": "DEFAULT"}),
    ("python:click:edit", {"editor": "touch ran;"}),
    ("python:click:launch", {"url": "data"}),
    ("python:PIL.ImageShow:show", {}),
    ("python:numpy.testing:runstring", {"astr": "import evilmod", "dict": {}}),
    ("python:sklearn:os.system", {"command": "touch ran"}),
    # not pip: who imports it changes setuptools for the rest of the process
    ("python:setuptools:setup", {}),
    ("python:yaml:unsafe_load", {"stream": "!!python/object/apply:os.system ['touch ran']"}),
    # Python's own
    ("python:os:system", {"command": "touch ran"}),
    ("python:subprocess:run", {"args": ["touch", "ran"]}),
    ("python:builtins:exec", {"source": "import evilmod"}),
    ("python:importlib:import_module", {"name": "evilmod"}),
    ("python:runpy:run_path", {"path_name": "evilmod.py"}),
    ("python:__main__:f", {}),
    # spellings
    ("python: evilmod:f", {}),
    ("python:evilmod:f;touch ran", {}),
    ("python:evilmod:f\n", {}),
    ("python:evilmod:f\x1b[2J", {}),
    ("python:evilmod:f.__globals__", {}),
    ("python:evilmod:__class__.__mro__", {}),
    ("python:.evilmod:f", {}),
    ("python:./evilmod.py:f", {}),
    ("python::", {}),
    ("python:еvilmod:f", {}),
    ("PYTHON:evilmod:f", {}),
    ("evilmod:f", {}),
    ("evilmod.py", {}),
    ("./model", {}),
    ("local-dir:data", {}),
    ("file:///etc/passwd", {}),
    ("http://127.0.0.1/model", {}),
    # the hub
    ("hf-hub:evil/repo@main", {}),
    ("hf-hub:evil/repo", {"architecture": "test_resnet"}),
    ("hf-hub:../../data", {}),
    ("hf-hub:evil/repo --trust python:evilmod:f", {}),
    ("hf_hub:evil/repo", {}),
    # the libraries' own names, and what else they could be made to do
    ("timm/hf-hub:evil/repo", {}),
    ("timm/hf_hub:evil/repo", {}),
    ("timm/local-dir:data", {}),
    ("timm/../evil", {}),
    ("timm/test_resnet", {"architecture": "hf-hub:evil/repo"}),
    ("timm/test_resnet", {"architecture": "local-dir:data"}),
    ("timm/test_resnet", {"architecture": "resnet18"}),
    ("timm/test_resnet", {"options": {"pretrained": True}}),
    ("timm/test_resnet", {"options": {"checkpoint_path": "model/evil.pth"}}),
    ("timm/test_resnet", {"options": {"pretrained_cfg": {"url": "http://127.0.0.1/x"}}}),
    ("timm/test_resnet", {"options": {"pretrained_cfg_overlay": {"file": "model/evil.pth"}}}),
    ("timm/test_resnet", {"options": {"block": "os.system"}}),
    ("timm/test_resnet", {"options": {"layers": [1_000_000, 1, 1, 1]}}),
    ("timm/test_resnet", {"options": {"img_size": 10**9}}),
    ("timm/test_resnet", {"options": {"img_size": [True, 32]}}),
    ("timm/test_resnet", {"options": {"act_layer": "torch.hub.load"}}),
    ("timm/test_resnet", {"options": {"features_only": True}}),
    ("timm/test_resnet", {"config": {"url": "http://127.0.0.1/x"}}),
    ("timm/test_resnet", {"options": [["pretrained", True]]}),
    ("torchvision/resnet18", {"weights": "DEFAULT"}),
    ("torchvision/resnet18", {"norm_layer": "os.system"}),
    ("torchvision/resnet18", {"progress": True}),
    ("torchvision/resnet18", {"width_per_group": 10**6}),
    ("torchvision/resnet18:../../x", {}),
    ("torchvision/fcn_resnet50", {"weights_backbone": "DEFAULT"}),
    ("torchvision/googlenet", {"aux_logits": "yes"}),
    ("torchvision/vit_b_16", {"image_size": 10**9}),
    ("torchvision/ssd300_vgg16", {"frozen_eps": "os.system"}),
    ("torchvision/_utils", {}),
    ("torchvision/get_model", {}),
]


def hostile(spec, arguments):
    fields = {"num_classes": 3, "task": "image", "weights": "pretrained", "checkpoint": None}
    return {"spec": spec, "arguments": arguments, **fields, "sha256": "0" * 64}


@pytest.mark.parametrize(("spec", "arguments"), SOURCES, ids=lambda value: ascii(value)[:60])
def test_a_hostile_source_runs_nothing(folder, spec, arguments):
    rewrite(folder / "model", source=hostile(spec, arguments))
    (folder / "model" / "evil.pth").write_bytes(pickle.dumps(GADGETS["os"]))
    (folder / "model" / "evil.npy").write_bytes(pickle.dumps(GADGETS["os"]))
    with nothing_may_run():
        assert_refused(run("inspect", "model"))
        with pytest.raises(ArtifactError):
            normswap.load("model")
    assert untouched(folder)


ELSEWHERE = [
    (spec, arguments)
    for spec, arguments in SOURCES
    if spec.startswith("python:") and "evil" not in spec
]


@pytest.mark.parametrize(("spec", "arguments"), ELSEWHERE, ids=lambda value: ascii(value)[:60])
def test_consent_to_a_module_is_none_to_what_it_imported_or_to_arguments(folder, spec, arguments):
    rewrite(folder / "model", source=hostile(spec, arguments))
    with nothing_may_run():
        assert_refused(run("inspect", "model", "--trust", spec))
    assert untouched(folder)


COMMANDS = {
    "inspect": [],
    "convert": ["--to", "gn", "-o", "out"],
    "finetune": ["--data", "data", "-o", "out"],
    "evaluate": ["--data", "data"],
    "export": ["-o", "out.onnx"],
    "sweep": ["--data", "data", "-o", "out"],
    "bench": ["--rounds", "1"],
    "unwrap": ["-o", "out"],
}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("spec", ["python:evilmod:f", "hf-hub:evil/repo", "python:torch:os.popen"])
def test_no_command_builds_a_hostile_source(folder, command, spec):
    rewrite(folder / "model", source=hostile(spec, {}))
    with nothing_may_run():
        result = run(command, "model", *COMMANDS[command])
    assert_refused(result)
    assert ("--trust" in result.stderr) == ("os.popen" not in spec)
    assert untouched(folder)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    path = tmp_path_factory.mktemp("trust-onnx") / "model.onnx"
    torch.manual_seed(0)
    normswap.export_onnx(tiny().eval(), path, example_inputs=torch.randn(2, 3, 8, 8))
    assert run("verify", path).exit_code == 0
    return path


def test_neither_does_verify_nor_a_teacher(folder, exported):
    rewrite(folder / "model", source=hostile("python:evilmod:f", {}))
    with nothing_may_run():
        result = run("verify", exported, "--model", "model")
        assert_refused(result)
        assert "--trust python:evilmod:f" in result.stderr
        from normswap.cli.finetune import _teacher

        source = sources.build(SPEC, pretrained=False)
        with pytest.raises(ArtifactError, match="--trust python:evilmod:f"):
            _teacher("model", source, (), new_head=False)
    assert untouched(folder)


def test_nor_what_comes_after_a_load_into_a_model_of_ones_own(folder, artefact, caplog):
    """The record travels with the model; saving, a new head and a teacher would build it."""
    rewrite(folder / "model", source=hostile("python:evilmod:f", {}))
    fresh = sources.build(SPEC, pretrained=False, num_classes=3, image_size=32).model
    with nothing_may_run():
        model = normswap.load("model", into=fresh)
        with pytest.raises(SpecError, match="--trust python:evilmod:f"):
            sources.resize_head(model, 5)
        with pytest.raises(SpecError, match="--trust python:evilmod:f"):
            sources.original(sources.provenance_of(model).source)
    normswap.save(model, folder.parent / "saved")
    assert "python:evilmod:f" in caplog.text
    assert untouched(folder)


@pytest.mark.parametrize(
    "spec",
    [
        'timm/test_resnet."""\nimport evilmod\n"""',
        'torchvision/resnet18:"""\nimport evilmod',
        'python:evilmod:f"""\nimport evilmod',
        "hf-hub:evil/repo\nimport evilmod",
        "timm/test_resnet.a\n",
    ],
)
@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"architecture": "test_resnet'); import evilmod; ('"},
        {"options": {"img_size=32); import evilmod; dict(a": 1}},
        {"image_size); import evilmod; dict(a": 1},
    ],
)
def test_a_record_writes_no_code(folder, spec, arguments):
    """``unwrap`` writes a Python file that names the source, and runs it."""
    rewrite(folder / "model", source=hostile(spec, arguments))
    fresh = sources.build(SPEC, pretrained=False, num_classes=3, image_size=32).model
    with nothing_may_run():
        model = normswap.load("model", into=fresh)
        with pytest.raises(NormSwapError):
            normswap.unwrap(model, folder.parent / "plain")
    assert not (folder.parent / "plain").exists()
    assert untouched(folder)


def test_consent_is_typed_shown_and_enough(folder, tmp_path):
    (folder / "mine.py").write_text(
        "from torch import nn\n"
        "from torchvision.models import resnet18\n"
        "def net():\n    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))\n"
        "class Inner:\n    net = staticmethod(net)\n"
    )
    model = normswap.load_model("python:mine:net").model
    normswap.save(model, "own")
    shown = run("inspect", "own")
    assert_refused(shown)
    line = "--trust python:mine:net"
    assert line in shown.stderr
    assert "mine.py" in shown.stderr
    assert run("inspect", "own", *line.split()).exit_code == 0
    assert run("inspect", "own", "--trust", "python:mine:other").exit_code == 1
    loaded = normswap.load("own", trust=["python:mine:net"])
    assert sources.resize_head is not None
    normswap.save(loaded, "again")  # asked once, not at every step
    assert json.loads((folder / "again" / record.RECORD).read_text())["source"]["spec"] == (
        "python:mine:net"
    )
    for bad in (True, "timm/resnet18", 3, [None]):
        with pytest.raises(SpecError, match="--trust"):
            normswap.load("own", trust=bad)
    sys.modules.pop("mine", None)


def test_a_record_names_a_factory_where_it_is_defined(folder):
    (folder / "mine.py").write_text("from evil_free import net\n")
    (folder / "evil_free.py").write_text(
        "from torch import nn\n"
        "def net():\n    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))\n"
        "class Zoo:\n    @staticmethod\n    def small():\n        return net()\n"
    )
    source = normswap.load_model("python:mine:net")
    assert source.spec == "python:mine:net"
    assert source.origin["spec"] == "python:evil_free:net"
    normswap.save(source.model, "own", source="python:mine:net")
    normswap.load("own", trust="python:evil_free:net")
    with pytest.raises(SpecError, match=r"need one attribute.*Try python:evil_free:net"):
        sources.rebuild({"spec": "python:mine:net"}, trust="python:mine:net")
    with pytest.raises(ArtifactError, match="does not build this model"):
        normswap.save(source.model, "two", source="python:evil_free:Zoo.small")
    for name in ("mine", "evil_free"):
        sys.modules.pop(name)


def test_the_current_folder_hides_none_of_pythons_own_modules(folder, monkeypatch):
    (folder / "colorsys.py").write_text("raise SystemExit(7)")
    (folder / "mine.py").write_text(
        "import colorsys\nfrom torch import nn\ndef net():\n    return nn.BatchNorm2d(4)\n"
    )
    monkeypatch.delitem(sys.modules, "colorsys", raising=False)
    assert isinstance(normswap.load_model("python:mine:net").model, nn.BatchNorm2d)
    sys.modules.pop("mine")


# ------------------------------------------------------------------------------------- pickles


class Gadget:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


GADGETS = {
    "os": Gadget(__import__("os").mkdir, "ran"),
    "eval": Gadget(eval, "__import__('os').mkdir('ran')"),
    "exec": Gadget(exec, "import os; os.mkdir('ran')"),
    "import": Gadget(__import__, "evilmod"),
    "getattr": Gadget(getattr, "x", "upper"),
    "torch.load": Gadget(torch.load, "model/evil.pth"),
    "hub": Gadget(torch.hub.load, "."),
    "popen": Gadget(__import__("subprocess").Popen, ["touch", "ran"]),
    "rmtree": Gadget(shutil.rmtree, "data"),
    "normswap": Gadget(normswap.load, "model"),
    "library": Gadget(__import__("normswap.libraries").libraries.library, "evilmod"),
    "partial": Gadget(__import__("functools").partial, __import__("os").mkdir, "ran"),
}


def pickles(folder, gadget):
    """The same gadget in each way a checkpoint can be written."""
    torch.save({"state_dict": {"x": gadget}}, folder / "zip.pth")
    torch.save(gadget, folder / "legacy.pth", _use_new_zipfile_serialization=False)
    (folder / "bare.bin").write_bytes(pickle.dumps({"model": gadget}))
    (folder / "old.pt").write_bytes(pickle.dumps(gadget, protocol=0))
    (folder / "named.safetensors").write_bytes(pickle.dumps(gadget))
    return ["zip.pth", "legacy.pth", "bare.bin", "old.pt", "named.safetensors"]


@pytest.mark.parametrize("gadget", GADGETS)
def test_no_pickle_runs_whatever_file_it_is(folder, tmp_path, gadget):
    names = pickles(tmp_path, GADGETS[gadget])
    with nothing_may_run():
        for name in names:
            with pytest.raises(NormSwapError):
                normswap.load_model(SPEC, checkpoint=tmp_path / name)
    for name in names:
        run_folder = tmp_path / f"run-{name}"
        run_folder.mkdir()
        shutil.copy(tmp_path / name, run_folder / "last.pt")
        shutil.copy(tmp_path / name, run_folder / "best.pt")
        net, data = tiny(), (torch.randn(4, 3, 8, 8), torch.arange(4) % 2)
        with nothing_may_run(), pytest.raises(NormSwapError):
            normswap.finetune(net, data, out=run_folder, resume=True)
    assert untouched(folder)


def tiny():
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(4, 2),
    )  # fmt: skip


# --------------------------------------------------------------------------------------- plans


def good_plan(target="frn"):
    model = sources.build(SPEC, pretrained=False, num_classes=3, image_size=32).model
    x = torch.zeros(2, 3, 32, 32)
    return normswap.plan(model, target, example_inputs=x).to_json()


@pytest.fixture(scope="module")
def plan():
    return good_plan()


def called(plan):
    """An entry whose ReLU is called in a forward, with its call."""
    return next(e for e in plan["entries"] if (e.get("removal") or {}).get("call"))


PLAN_EDITS = {
    "a recipe of a module": lambda e: e["recipe"].update(target="os.system"),
    "becomes a function": lambda e: e.update(becomes="os.system"),
    "both": lambda e: (e["recipe"].update(target="eval"), e.update(becomes="eval")),
    "a dunder": lambda e: (e["recipe"].update(target="__init__"), e.update(becomes="__init__")),
    "an argument": lambda e: e["recipe"].update(build="os.system"),
    "a class attribute": lambda e: e["recipe"].update(fallback="evilmod"),
    "a field": lambda e: e.update(__class__="evilmod"),
    "eps of text": lambda e: e["recipe"].update(eps="__import__('evilmod')"),
    "a kind": lambda e: e.update(kind="evilmod.f"),
    "a name through a class": lambda e: e.update(names=["__class__"]),
    "a name through globals": lambda e: e.update(names=["forward.__globals__"]),
    "a name of no module": lambda e: e.update(names=["training"]),
    "a producer": lambda e: e.update(producer=["os.system"]),
    "an init": lambda e: e.update(init="exec"),
    "a rank": lambda e: e.update(rank="exec"),
    "removal of a class": lambda e: e.update(removal={"how": "module", "names": ["conv1"]}),
    "removal of something": lambda e: e.update(removal="os.system"),
}  # fmt: skip


@pytest.mark.parametrize("edit", PLAN_EDITS)
def test_a_hostile_plan_runs_nothing(folder, plan, edit):
    data = copy.deepcopy(plan)
    PLAN_EDITS[edit](data["entries"][0])
    (folder.parent / "plan.json").write_text(json.dumps(data))
    rewrite(folder / "model", plans=[data])
    convert = ["convert", SPEC, "--no-pretrained", "--num-classes", "3", "--image-size", "32"]
    with nothing_may_run():
        assert_refused(run(*convert, "--plan", folder.parent / "plan.json", "-o", "out"))
        assert_refused(run("inspect", "model"))
    assert untouched(folder)


HOSTILE_TARGETS = [
    "gn(groups=__import__('evilmod'))",
    "gn(groups=evilmod.f())",
    "gn(groups=[].__class__.__base__.__subclasses__())",
    "gn(groups=(lambda: __import__('evilmod'))())",
    "gn(groups=f'{__import__(chr(101))}')",
    "gn(groups=open('ran', 'w'))",
    "gn(groups=9**9**9**9)",
    "gn(groups=" + "-" * 900 + "1)",
    "gn(groups=" + "[" * 400 + "]" * 400 + ")",
    "gn(groups=" + "-" * 50_000 + "1)",
    "gn(" + "a=1," * 20_000 + ")",
    "gn(__class__=evilmod)",
    "gn(__init__=1)",
    "frn(eps=evilmod)",
    "os.system(command='touch ran')",
    "python:evilmod:f",
    "evilmod:f",
    "evilmod.f()",
    "__import__",
    "__class__",
    "build(evilmod)",
]


@pytest.mark.parametrize("target", HOSTILE_TARGETS, ids=lambda value: value[:40])
def test_a_target_is_read_and_never_evaluated(folder, artefact, plan, target):
    """On the command line, in a plan, and in the plan of an artefact."""
    model = [SPEC, "--no-pretrained", "--num-classes", "3", "--image-size", "32"]
    data = copy.deepcopy(plan)
    data["entries"][0].update(becomes=target)
    data["entries"][0]["recipe"].update(target=target)
    (folder.parent / "plan.json").write_text(json.dumps(data))
    rewrite(folder / "model", plans=[{**data, "target": target}])
    with nothing_may_run():
        assert_refused(run("convert", *model, "--to", target, "-o", "out"))
        assert_refused(run("sweep", *model, "--to", target, "--data", "data", "-o", "out"))
        assert_refused(run("bench", *model, "--to", target))
        assert_refused(run("convert", *model, "--plan", folder.parent / "plan.json", "-o", "out"))
        assert_refused(run("inspect", "model"))
    assert untouched(folder)


@pytest.mark.parametrize("field", ["recipe", "target"])
@pytest.mark.parametrize("target", HOSTILE_TARGETS[:5])
def test_a_cell_of_a_sweep_names_nothing_that_runs(folder, field, target):
    images = torch.arange(96.0).reshape(6, 1, 4, 4) / 96, torch.arange(6) % 2
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 2))
    options = normswap.FineTune(epochs=1, batch_size=2, tensorboard=False, device="cpu")
    settings = {"targets": ["gn"], "batch_sizes": [2], "seeds": 1, "options": options}
    out = folder.parent / "sweep"
    sweep(model, images, images, **settings, out=out)
    cell = out / "cells" / "gn-b2-s0.json"
    data = json.loads(cell.read_text()) | {field: target}
    cell.write_text(json.dumps(data | {"sha256": files.json_digest(data)}))
    with nothing_may_run(), pytest.raises(TrainingError, match="cell"):
        sweep(model, images, images, **settings, out=out)
    assert untouched(folder)


class Called(nn.Module):
    """A ReLU that is called, and other calls that a plan could name in its place."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def check(self, x):
        if x.isnan().any():
            raise ValueError("refused")
        return x

    def forward(self, x):
        return torch.relu(self.norm(self.conv(self.check(x))))


def test_a_plan_takes_out_no_other_call_than_a_relu():
    x = torch.randn(1, 3, 8, 8)
    good = normswap.plan(Called(), "frn", example_inputs=x).to_json()
    call = good["entries"][0]["removal"]["call"]
    assert call["method"] == "forward"
    from normswap.graph.callsites import method_source

    places = list(method_source(Called.forward).calls)
    assert len(places) == 4
    for place in places:
        data = copy.deepcopy(good)
        data["entries"][0]["removal"]["call"]["position"] = list(place)
        if list(place) == list(call["position"]):
            normswap.apply_plan(Called(), Plan.from_json(data))
            continue
        with pytest.raises(NormSwapError, match="call"):
            normswap.apply_plan(Called(), Plan.from_json(data))


@pytest.mark.parametrize(
    "method", ["__init__", "check", "__reduce__", "to", "zero_grad", "nowhere"]
)
def test_a_plan_edits_no_other_method(method):
    x = torch.randn(1, 3, 8, 8)
    data = normswap.plan(Called(), "frn", example_inputs=x).to_json()
    data["entries"][0]["removal"]["call"]["method"] = method
    with nothing_may_run(), pytest.raises(NormSwapError):
        normswap.apply_plan(Called(), Plan.from_json(data))


# -------------------------------------------------------------------- what the hub and ONNX say


HUB = [
    ("hf-hub:other/repo", {}),
    ("local-dir:data", {}),
    ("evilmod.f", {}),
    (3, {}),
    ("test_resnet", {"checkpoint_path": "model/evil.pth"}),
    ("test_resnet", {"pretrained_cfg": {"url": "http://127.0.0.1/x"}}),
    ("test_resnet", {"block": "https://127.0.0.1/x"}),
    ("test_resnet", {"block": {"a": 1}}),
    ("test_resnet", {"layers": [10**6, 1, 1, 1]}),
    ("test_resnet", {"drop_rate": float("nan")}),
    ("test_resnet", {"features_only": True}),
    ("test_resnet", {"x y": 1}),
]


@pytest.mark.parametrize(("architecture", "options"), HUB, ids=lambda value: ascii(value)[:40])
def test_a_hub_says_numbers_and_names_alone(folder, monkeypatch, architecture, options):
    monkeypatch.setattr(
        "timm.models.load_model_config_from_hf", lambda *_a, **_k: ({}, architecture, options)
    )
    monkeypatch.setattr("normswap.factories.request._hub_has_address", lambda _: False)
    with nothing_may_run():
        assert_refused(run("inspect", "hf-hub:evil/repo", "--no-pretrained"))
    assert untouched(folder)


def test_a_hub_does_not_say_where_weights_come_from(monkeypatch):
    import timm

    places = {"url": "http://127.0.0.1/x", "file": "evil.pth", "hf_hub_filename": "evil.pth"}
    config = {**places, "custom_load": "hf", "state_dict": {}, "input_size": [3, 32, 32]}
    monkeypatch.setattr(
        "timm.models.load_model_config_from_hf", lambda *_a, **_k: (config, "test_resnet", {})
    )
    given = {}
    real = timm.create_model

    def create(*arguments, **options):
        given.update(options["pretrained_cfg"])
        return real(*arguments, **options)

    monkeypatch.setattr(timm, "create_model", create)
    sources.build("hf-hub:me/it", pretrained=False)
    assert given == {"input_size": [3, 32, 32]}


@pytest.mark.parametrize(
    "field", ["source", "plans", "history", "export", "class_names", "versions", "preprocessing"]
)
def test_what_an_onnx_file_names_is_never_imported(folder, exported, field):
    proto = onnx.load(exported)
    entries = {entry.key: entry.value for entry in proto.metadata_props}
    value = hostile("python:evilmod:f", SHELL)
    entries[f"normswap.{field}"] = json.dumps([value] if field == "plans" else value)
    del entries["normswap.metadata_sha256"]
    entries["normswap.metadata_sha256"] = metadata_hash(entries)
    onnx.helper.set_model_props(proto, entries)
    onnx.save(proto, folder.parent / "model.onnx")
    with nothing_may_run():
        results = [
            run("verify", folder.parent / "model.onnx"),
            run("evaluate", folder.parent / "model.onnx", "--data", "data"),
        ]
    for result in results:
        assert result.exit_code in (0, 1, 2, 3), result.output
        assert "Unexpected" not in result.stderr, result.stderr
    assert untouched(folder)


# -------------------------------------------------------------------------------- small things


def test_a_malformed_spec_is_not_offered_to_be_typed():
    for spec in ("python:a:b;rm", "python:a b:c", "hf-hub:a/b;c", f"python:{'a' * 300}:f"):
        with pytest.raises(SpecError, match="malformed") as caught:
            trust.check_consent(spec, frozenset({spec}))
        assert "--trust" not in str(caught.value)


def test_consent_to_one_is_none_to_another():
    with pytest.raises(SpecError, match="--trust python:a:c"):
        trust.check_consent("python:a:c", frozenset({"python:a:b", "python:a"}))
    trust.check_consent("python:a:b", frozenset({"python:a:b"}))
    trust.check_consent("timm/resnet18", frozenset())
    trust.check_consent(TOUR, frozenset())


# ------------------------------------------------------------- what lies in the current folder


def test_a_folder_that_is_called_like_a_model_is_none(folder, artefact, caplog):
    shutil.copytree(artefact, folder / "timm" / "test_resnet")
    source = normswap.load_model(SPEC, pretrained=False)
    assert source.model.fc.out_features == 1000
    assert "folder of that name is ./timm/test_resnet" in caplog.text
    assert normswap.load_model(f"./{SPEC}").model.fc.out_features == 3
    assert normswap.load_model(folder / "timm" / "test_resnet").model.fc.out_features == 3
    shutil.rmtree(folder / "timm")


def test_settings_for_pictures_in_the_current_folder_are_not_read(tmp_path):
    """``usetex`` ran the first program called latex; a broken file ended the command."""
    here, tools = tmp_path / "here", tmp_path / "tools"
    for place in (here, tools):
        place.mkdir()
    for name in ("latex", "pdflatex", "dvipng"):
        (tools / name).write_text(f"#!/bin/sh\ntouch {tmp_path}/ran\nexit 1\n")
        (tools / name).chmod(0o755)
    (here / "matplotlibrc").write_text("text.usetex: True\nbackend: module://evilmod\n")
    code = (
        f"import sys; sys.path[:0] = [{str(files.Path(normswap.__file__).parents[1])!r}]\n"
        "from click.testing import CliRunner\nfrom normswap.cli.options import cli_command\n"
        "from normswap import pictures\n"
        "@cli_command('x')\ndef x(): pictures.confusion([[1, 0], [0, 1]], ['a', '$b'], 'c.png')\n"
        "found = CliRunner().invoke(x, [], catch_exceptions=False)\n"
        "import matplotlib; print(matplotlib.rcParams['text.usetex'])"
    )
    path = f"{tools}{os.pathsep}{os.environ['PATH']}"
    found = subprocess.run(
        [sys.executable, "-P", "-c", code],
        cwd=here,
        env={**os.environ, "PATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.stdout.strip() == "False", found.stderr
    assert (here / "c.png").stat().st_size > 1000
    assert not (tmp_path / "ran").exists()


DIVISIONS = [
    *({}, {"val_split": "x", "seed": 0}, {"val_split": 2, "seed": 0}, {"val_split": 0.5}),
    *({"val_split": 0.5, "seed": "y"}, {"val_split": 0.5, "seed": 1e400}, {"val_split": []}),
    *("x", [1], None, 5),
]


@pytest.mark.parametrize("division", DIVISIONS, ids=str)
def test_a_division_of_images_is_two_numbers(folder, division):
    from normswap.data import listing_digest

    for name in "abc":
        image = folder / "data" / name / "1.png"
        image.parent.mkdir()
        PIL.Image.new("RGB", (8, 8)).save(image)
    if isinstance(division, dict):
        division = {**division, "listing": listing_digest("data")}
    rewrite(folder / "model", history=[{"step": "fine-tuned", "division": division}])
    assert_refused(run("evaluate", "model", "--data", "data"))


@pytest.mark.parametrize("names", [["a"], [], ["a"] * 4])
def test_every_output_has_one_name(folder, names):
    PIL.Image.new("RGB", (32, 32)).save(folder / "data" / "a.png")
    rewrite(folder / "model", class_names=names)
    assert_refused(run("predict", "model", "data"))


def test_half_a_sign_is_no_text(folder):
    rewrite(folder / "model", class_names=["\ud800"] * 3)
    assert_refused(run("inspect", "model"))


def test_a_card_is_a_table_of_text(folder):
    text = "<script>x</script> [a](javascript:x) | `b` \r\n# head \x1b[2J"
    data = json.loads((folder / "model" / record.RECORD).read_text())
    for entry in data["plans"][0]["entries"]:
        entry["reason"] = text
    changes = {"plans": data["plans"], "history": [{"step": text}], "versions": {"torch": text}}
    rewrite(folder / "model", model_name=text, **changes)
    normswap.save(normswap.load("model"), "again")
    card = (folder / "again" / "README.md").read_text()
    assert "&lt;script>" in card
    for bad in ("<script", "](java", "\r", "\n# head", "\x1b"):
        assert bad not in card


def test_a_batch_that_an_onnx_file_asks_for_fits_in_memory(folder, exported, monkeypatch):
    from normswap.onnx import OnnxModel

    proto = onnx.load(exported)
    entries = {entry.key: entry.value for entry in proto.metadata_props}
    wanted = normswap.data.Preprocessing((3, 224, 224)).to_json()
    entries["normswap.preprocessing"] = json.dumps(wanted)
    del entries["normswap.metadata_sha256"]
    entries["normswap.metadata_sha256"] = metadata_hash(entries.items())
    onnx.helper.set_model_props(proto, entries)
    onnx.save(proto, folder.parent / "m.onnx")
    monkeypatch.setattr("normswap.onnx.runtime._fixed", lambda _shape: 200_000)
    assert OnnxModel is not None
    PIL.Image.new("RGB", (32, 32)).save(folder / "data" / "a.png")
    result = run("predict", folder.parent / "m.onnx", "data")
    assert_refused(result)
    assert "a batch of 200000 images" in result.stderr


def test_no_file_is_larger_than_a_protobuf_can_be(tmp_path):
    with (tmp_path / "m.onnx").open("wb") as file:
        file.truncate(5 << 30)  # a hole
    result = run("verify", tmp_path / "m.onnx")
    assert result.exit_code == 1
    assert "which no ONNX file can have" in result.stderr
