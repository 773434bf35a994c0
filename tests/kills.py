"""A process that dies at a chosen file event: before it opens for writing, renames, removes, makes.

Between two events nothing changes under any name that somebody else reads, so these are all the
states in which a killed process can leave the disk.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
from pathlib import Path

import torch
import training_runs

EVENTS = {
    "open",
    "os.rename",
    "os.remove",
    "os.mkdir",
    "os.rmdir",
    "os.truncate",
    "shutil.rmtree",
    "normswap.exchange",
}
KILLED, ENDED = 77, 0
_plan = {"folder": None}


def _hook(event, arguments):
    if not _plan or _plan["folder"] is None or event not in EVENTS:
        return  # no plan: the interpreter is shutting down and has cleared this module
    if event == "open" and not _writes(*arguments[1:3]):
        return
    places = [item for item in arguments[:2] if isinstance(item, str | os.PathLike)]
    within = event in ("os.remove", "os.rmdir") and arguments[1] != -1  # rmtree's, by descriptor
    if not within and not any(str(place).startswith(_plan["folder"]) for place in places):
        return
    with _plan["log"].open("a") as file:
        file.write(f"{event} {[str(place) for place in places]}\n")
    if _plan["seen"] == _plan["at"]:
        os._exit(KILLED)
    _plan["seen"] += 1


def _writes(mode, flags):
    if isinstance(mode, str):
        return any(sign in mode for sign in "wax+")
    return bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))


sys.addaudithook(_hook)  # cannot be taken away again, so it idles where there is no plan


def run(work, arguments, folder, at=-1, start="fork"):
    """Do some work in a process of its own that is killed at one of its file events.

    Args:
        work: a function.
        arguments: of it.
        folder: events elsewhere do not count.
        at: the event's number; -1 lets the work end.
        start: ``"forkserver"`` for what trains: autograd cannot always be forked once it ran.

    Returns:
        Whether it was killed, and the events that it reached.
    """
    context = multiprocessing.get_context(start)
    if start == "forkserver":
        context.set_forkserver_preload(["training_runs", *training_runs.HEAVY])
    log = Path(folder).with_name(f"{Path(folder).name}.events")
    child = context.Process(target=_until, args=(work, arguments, str(folder), at, log))
    child.start()
    child.join()
    events = log.read_text().splitlines()
    log.unlink()
    assert child.exitcode in (KILLED, ENDED), f"exit code {child.exitcode} after {events[-3:]}"
    return child.exitcode == KILLED, events


def _until(work, arguments, folder, at, log):
    torch.set_num_threads(1)
    _plan.update(folder=folder + os.sep, at=at, seen=0, log=log)
    work(*arguments)
    _plan["folder"] = None
