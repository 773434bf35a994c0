"""The README's line for several machines, on two that are network namespaces of this one.

Each host has a namespace, a name and a table of names of its own, and one cable runs between the
two; nothing of this machine's own network is touched. Needs root and ``ip``; seven processes that
start torch take their time, so it runs with ``NORMSWAP_HOSTS=1`` alone.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file
from torch import nn
from training_runs import command_line

HERE = Path(__file__).parent
ADDRESSES = {"alpha": "10.77.0.1", "beta": "10.77.0.2"}
AS_HOST = 'hostname "$1" && mount --bind "$2" /etc/hosts && shift 2 && exec "$@"'
EPOCHS = 6


def can_make_hosts():
    if os.environ.get("NORMSWAP_HOSTS") != "1":
        return False
    if os.geteuid() or not all(map(shutil.which, ("ip", "unshare", "mount", "hostname"))):
        return False
    name = f"normswap-try-{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, check=False)
    subprocess.run(["ip", "netns", "delete", name], capture_output=True, check=False)
    return made.returncode == 0


pytestmark = pytest.mark.skipif(not can_make_hosts(), reason="needs NORMSWAP_HOSTS=1, root, and ip")


def net():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 3),
    )


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """A converted network and images for it."""
    folder = tmp_path_factory.mktemp("start")
    draw = np.random.default_rng(0)
    for part, count in (("train", 7), ("val", 2)):
        for label in range(3):
            (folder / "data" / part / f"class{label}").mkdir(parents=True)
            for number in range(count):
                values = draw.integers(0, 120, (16, 16, 3), dtype=np.uint8)
                values[:, :, label] += 100
                path = folder / "data" / part / f"class{label}" / f"{number}.png"
                Image.fromarray(values).save(path)
    spec = ["python:test_two_hosts:net", "--image-size", "16"]
    command_line("convert", *spec, "--to", "gn", "-o", folder / "gn")
    return folder


@pytest.fixture
def hosts(tmp_path):
    """Commands that run what follows them on one host or the other."""
    table = tmp_path / "hosts"
    names = "".join(f"{address} {name}\n" for name, address in ADDRESSES.items())
    table.write_text(f"127.0.0.1 localhost\n{names}")
    spaces = {name: f"normswap-{name}-{os.getpid()}" for name in ADDRESSES}
    try:
        for space in spaces.values():
            ip("netns", "add", space)
            ip("-n", space, "link", "set", "lo", "up")
        alpha, beta = spaces.values()
        ip("link", "add", "cable", "netns", alpha, "type", "veth", "peer", "cable", "netns", beta)
        for name, space in spaces.items():
            ip("-n", space, "address", "add", f"{ADDRESSES[name]}/24", "dev", "cable")
            ip("-n", space, "link", "set", "cable", "up")
        yield {name: on_host(name, space, table) for name, space in spaces.items()}
    finally:
        for space in spaces.values():
            power_cut(space)
            subprocess.run(["ip", "netns", "delete", space], capture_output=True, check=False)


def ip(*arguments):
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


def power_cut(space):
    """Everything on that host is gone at once."""
    found = subprocess.run(["ip", "netns", "pids", space], capture_output=True, text=True)
    for number in found.stdout.split():
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(number), signal.SIGKILL)


def on_host(name, space, table):
    inside = ["unshare", "--uts", "--mount", "sh", "-c", AS_HOST, "sh", name, str(table)]
    return ["ip", "netns", "exec", space, *inside]


def line(start, out, *more):
    """The README's, for these hosts; what is behind it may be more."""
    text = re.search(r"^torchrun (.*?)\n```", (HERE.parent / "README.md").read_text(), re.M | re.S)
    words = text.group(1).replace("\\\n", " ").split()
    place = {"HOST:29500": "alpha:29500", "8": "1", "data/": str(start / "data")}
    place |= {"resnet50-gn": str(start / "gn"), "tuned": str(out)}
    words = [place.get(word, word) for word in words]
    assert "--nnodes" in words
    options = ["--device", "cpu", "--epochs", EPOCHS, "--checkpoint-every", 0, "--no-aug"]
    options += ["--teacher", "none", "--trust", "python:test_two_hosts:net", *more]
    return [sys.executable, "-m", "torch.distributed.run", *words, *map(str, options)]


def begin(command, where=()):
    paths = os.pathsep.join([str(HERE.parent), str(HERE)])
    more = {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [*where, *command],
        env=os.environ | more,
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
    )


def end(*processes, seconds=300):
    """Wait for all of them; their last words if one failed."""
    try:
        errors = [process.communicate(timeout=seconds)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    return [process.returncode for process in processes], "\n".join(errors)


def epochs(out):
    """How many have ended."""
    file = out / "metrics.jsonl"
    return len(re.findall('"kind": "epoch"', file.read_text())) if file.exists() else 0


def same(one, other):
    first, second = (load_file(folder / "model.safetensors") for folder in (one, other))
    return all((first[name] == second[name]).all() for name in first)


@pytest.mark.timeout(900)
def test_two_hosts_are_two_processes_of_one(start, hosts, tmp_path):
    alone = line(start, tmp_path / "alone")
    alone[alone.index("--nnodes") + 1] = "1"
    alone[alone.index("--nproc-per-node") + 1] = "2"
    alone[alone.index("alpha:29500")] = "127.0.0.1:0"
    codes, errors = end(begin(alone))
    assert codes == [0], errors

    both = tmp_path / "both"
    codes, errors = end(*(begin(line(start, both), where) for where in hosts.values()))
    assert codes == [0, 0], errors
    assert same(tmp_path / "alone", both)

    broken = tmp_path / "broken"
    running = {name: begin(line(start, broken), where) for name, where in hosts.items()}
    deadline = time.monotonic() + 200
    while epochs(broken) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    power_cut(hosts["beta"][3])
    codes, errors = end(*running.values())
    assert 0 not in codes
    assert epochs(broken) < EPOCHS, "it was over too soon"
    again = [begin(line(start, broken, "--resume"), where) for where in hosts.values()]
    codes, errors = end(*again)
    assert codes == [0, 0], errors
    assert "resumed at step" in errors
    assert same(tmp_path / "alone", broken)
