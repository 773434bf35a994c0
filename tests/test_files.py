"""Whole or not there, one writer at a time, and what a killed writer leaves is put right."""

import errno
import os
import threading
import time
from pathlib import Path

import click
import pytest
import torch

from normswap import files
from normswap.cli.options import keep_others_out
from normswap.errors import BusyError, NormSwapError

OWN = ("a", "b")


def put(target, **contents):
    with files.draft_folder(target, OWN) as draft:
        for name, text in contents.items():
            (draft / name).write_text(text)


def read(folder):
    return {path.name: path.read_text() for path in folder.iterdir()}


def mark(folder, *gone, kind="folder"):
    """As a writer marks what is ready: with the number that the file system gave it."""
    (folder / ".whole").write_text("\n".join([f"{folder.stat().st_ino} {kind}", *gone]))


def left(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_folder_takes_the_whole_content_of_its_draft(tmp_path):
    target = tmp_path / "above" / "out"
    put(target, a="1", b="1")
    put(target, a="2")
    assert read(target) == {"a": "2"}
    target.chmod(0o750)
    put(target, b="3")
    assert target.stat().st_mode & 0o777 == 0o750
    assert left(target.parent) == ["out"]


@pytest.mark.parametrize("exchange", [True, False])
def test_what_is_not_ours_stays_where_it_is(exchange, tmp_path, monkeypatch):
    if not exchange:
        monkeypatch.setattr(files, "_exchange", lambda *_: False)
    target = tmp_path / "out"
    put(target, a="1", b="1")
    (target / "mine").mkdir()
    (target / "mine" / "notes.txt").write_text("notes")
    before = (target / "mine").stat().st_ino
    put(target, a="2")
    assert left(target) == ["a", "mine"]
    assert (target / "mine").stat().st_ino == before
    assert (target / "mine" / "notes.txt").read_text() == "notes"
    assert left(tmp_path) == ["out"]


def test_a_draft_that_fails_changes_nothing(tmp_path):
    put(tmp_path / "out", a="1")
    with pytest.raises(ZeroDivisionError), files.draft_folder(tmp_path / "out", OWN) as draft:
        (draft / "a").write_text(str(1 / 0))
    with pytest.raises(KeyError), files.draft_folder(tmp_path / "new" / "out", OWN):
        raise KeyError
    assert read(tmp_path / "out") == {"a": "1"}
    assert left(tmp_path) == ["out"]


def test_files_are_replaced_whole(tmp_path):
    path = files.write_whole(tmp_path / "new" / "x.txt", "héllo")
    assert path.read_text(encoding="utf-8") == "héllo"
    files.write_whole(path, b"bytes")
    files.write_whole(path, lambda part: part.write_text("by itself"))
    assert path.read_text() == "by itself"
    with pytest.raises(ZeroDivisionError):
        files.write_whole(path, lambda part: part.write_text(str(1 / 0)))
    assert left(path.parent) == ["x.txt"]
    assert path.read_text() == "by itself"
    with pytest.raises(OSError, match="no regular file"):
        files.write_whole(os.devnull, "")


def test_leftovers_of_killed_writers_go_and_what_was_ready_is_completed(tmp_path):
    target = tmp_path / "out"
    put(target, a="1", b="1")
    (target / "mine").write_text("mine")
    (tmp_path / ".out.0123abcd.draft").mkdir()
    (tmp_path / ".out.0123abcd.draft" / "a").write_text("half")
    (target / ".b.0123abcd.part").write_text("half")
    (tmp_path / ".out.lock").touch()  # nobody holds it any more
    other = tmp_path / ".outer.0123abcd.draft"  # somebody else's
    other.mkdir()
    ready = tmp_path / ".out.89abcdef.ready"
    ready.mkdir()
    (ready / "a").write_text("2")
    mark(ready, "b")
    assert files.current(target, "a").read_text() == "2"
    assert files.current(target, "mine") == target / "mine"
    assert files.contents(target) == {"a", "b", "mine"}
    with files.sole_writer(target):
        pass
    assert read(target) == {"a": "2", "mine": "mine"}
    assert left(tmp_path) == [".outer.0123abcd.draft", "out"]


def test_what_was_exchanged_does_not_come_back(tmp_path):
    target = tmp_path / "out"
    put(target, a="new")
    mark(target)
    old = tmp_path / ".out.89abcdef.ready"
    old.mkdir()
    (old / "a").write_text("old")
    assert files.current(target, "a").read_text() == "new"
    with files.sole_writer(target):
        pass
    assert read(target) == {"a": "new"}
    assert left(tmp_path) == ["out"]


@pytest.mark.parametrize("there", [True, False])
def test_what_version_0_1_moved_away_comes_back(there, tmp_path):
    target, old = tmp_path / "out", tmp_path / ".out.0123abcd.old"
    if there:
        put(target, a="new")
    old.mkdir()
    (old / "a").write_text("old")
    (old / "mine").write_text("mine")
    with files.sole_writer(target):
        pass
    assert read(target) == {"a": "new" if there else "old", "mine": "mine"}
    assert left(tmp_path) == ["out"]


def test_the_second_writer_is_told(tmp_path):
    target = tmp_path / "out"
    refusals = []

    def second():
        try:
            put(target, a="second")
        except BusyError as error:
            refusals.append(str(error))

    with files.sole_writer(target):
        put(target, a="first")  # the same writer, still
        files.write_whole(target / "b", "first")
        thread = threading.Thread(target=second)
        thread.start()
        thread.join()
        child = os.fork()
        if child == 0:
            files._held.clear()  # as a process that was not forked
            code = 1
            try:
                put(target, a="second")
            except BusyError:
                code = 7
            finally:
                os._exit(code)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    assert refusals == [
        f"{target}: got another run that is writing it; need one at a time. "
        "Try again when that one has ended, or another output."
    ]
    assert read(target) == {"a": "first", "b": "first"}
    put(target, a="later")
    assert left(tmp_path) == ["out"]


@pytest.mark.parametrize("number", [errno.ENOENT, errno.EACCES, errno.EPERM, errno.EROFS])
def test_where_nothing_can_be_made_nobody_is_writing(number, tmp_path, monkeypatch):
    """/proc says that there is no such file, which filelock takes for a lock that was removed."""
    real = os.open

    def refused(path, flags, *more, **how):
        if flags & os.O_CREAT and str(path).startswith(str(tmp_path)):
            raise OSError(number, os.strerror(number), str(path))
        return real(path, flags, *more, **how)

    monkeypatch.setattr(os, "open", refused)
    target = tmp_path / "out"
    with pytest.raises(OSError, match=os.strerror(number)) as caught, files.sole_writer(target):
        pass
    assert not isinstance(caught.value, BusyError)
    assert caught.value.filename == str(target)
    context = click.Context(click.Command("x"))
    with context, pytest.raises(NormSwapError, match="cannot be written to") as told:
        keep_others_out(target)
    assert str(told.value).startswith(f"{target}: got a place that cannot be written to (")
    assert "lock" not in str(told.value)
    assert "another run" not in str(told.value)


def test_who_writes_one_file_waits_for_the_other(tmp_path):
    path, ready = tmp_path / "x.txt", tmp_path / "ready"
    child = os.fork()
    if child == 0:
        with files.sole_writer(path):
            ready.touch()
            time.sleep(0.5)
        os._exit(0)
    while not ready.exists():
        time.sleep(0.01)
    files.write_whole(path, "later")
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert left(tmp_path) == ["ready", "x.txt"]


def test_digests_tell_values_types_shapes_and_places_apart():
    zero, one = torch.zeros(2), torch.ones(2)
    values = [
        {"a": zero}, {"a": one}, {"b": zero}, {"a": zero.double()}, {"a": torch.zeros(2, 1)},
        {"a": zero, "b": one}, {"b": one, "a": zero}, [zero], (zero,), [[zero]], 1, 1.0, True, "1",
        None, {"a": 1}, {"a": "1"}, ["ab", "c"], ["a", "bc"], torch.tensor(float("nan")), -5, 5,
    ]  # fmt: skip
    assert len({files.content_digest(value) for value in values}) == len(values)
    assert files.content_digest({"a": [zero]}) == files.content_digest({"a": [torch.zeros(2)]})
    assert files.weights_digest({"a": zero, "b": one}) == files.weights_digest(
        {"b": one, "a": zero}
    )
    half = torch.zeros(3, dtype=torch.bfloat16)
    assert files.weights_digest({"a": half}) != files.weights_digest({"a": half.half()})


@pytest.mark.parametrize(
    "name", ["{victim}", "../victim", "x/../../victim", "victim/.", "./victim"]
)
@pytest.mark.parametrize("kind", ["folder", "file"])
@pytest.mark.parametrize("own", [True, False])
def test_a_planted_mark_removes_nothing_elsewhere(own, name, kind, tmp_path, monkeypatch):
    """Whoever made a folder may have put in what a killed writer leaves, with names of his own."""
    removed = []
    monkeypatch.setattr(files.shutil, "rmtree", lambda path, **_: removed.append(Path(path)))
    victim = tmp_path / "victim"
    victim.mkdir()
    target = tmp_path / "home" / "out"
    target.parent.mkdir()
    target.mkdir() if kind == "folder" else target.write_text("old")
    planted = target.parent / ".out.0123abcd.ready"
    planted.mkdir()
    if own:  # even if he could guess the number
        mark(planted, name.format(victim=victim), "notes.txt", kind=kind)
    else:
        (planted / ".whole").write_text(name.format(victim=victim) + "\nnotes.txt")
    notes = (target if kind == "folder" else target.parent) / "notes.txt"
    notes.write_text("beside a file lies what is not its own")
    with files.sole_writer(target):
        pass
    assert {path.resolve() for path in removed} <= {planted.resolve()}
    assert notes.exists() is not (own and kind == "folder")


@pytest.fixture
def box(tmp_path):
    """A folder somebody else made, in a box that holds a file of the user's, as it does itself."""
    repo = tmp_path / "box" / "repo"
    repo.mkdir(parents=True)
    for place in (repo, repo.parent):
        (place / "mine").write_text("mine")
    return repo


MARKS = ["", "mine", "1 folder\nmine", "1 file\nmine", "folder", "\0", "mine\n" * 9]


@pytest.mark.parametrize("text", MARKS)
@pytest.mark.parametrize("own_name", [True, False])
def test_what_is_planted_in_a_folder_replaces_no_file_in_it_or_beside_it(own_name, text, box):
    """A file of the folder's own name once made the folder above the place of all the others."""
    planted = box / ".repo.0123abcd.ready"
    planted.mkdir()
    (planted / "mine").write_text("theirs")
    (planted / ".whole").write_text(text)
    if own_name:
        (planted / "repo").write_text("theirs")
    for _ in range(2):
        with files.sole_writer(box):
            pass
        assert [(place / "mine").read_text() for place in (box, box.parent)] == ["mine", "mine"]
        assert files.current(box, "mine") == box / "mine"
    assert planted.exists()


def test_what_is_planted_beside_a_file_replaces_none(tmp_path):
    (tmp_path / "m.onnx").write_text("old")
    (tmp_path / "mine").write_text("mine")
    planted = tmp_path / ".m.onnx.0123abcd.ready"
    planted.mkdir()
    for name in ("mine", "m.onnx", ".whole"):
        (planted / name).write_text("1 file")
    with files.sole_writer(tmp_path / "m.onnx"):
        pass
    assert (tmp_path / "mine").read_text() == "mine"
    assert (tmp_path / "m.onnx").read_text() == "old"


@pytest.mark.parametrize("kind", ["ready", "old", "draft", "part", "next"])
@pytest.mark.parametrize("inside", [True, False])
def test_a_planted_link_leads_nowhere(inside, kind, box, tmp_path, monkeypatch):
    monkeypatch.setattr(files.shutil, "rmtree", lambda path, **_: pytest.fail(f"removes {path}"))
    victim = tmp_path / "victim"
    victim.mkdir()
    (victim / "key").write_text("mine")
    mark(victim)
    name = ".repo.next" if kind == "next" else f".repo.0123abcd.{kind}"
    ((box if inside else box.parent) / name).symlink_to(victim)
    with files.sole_writer(box):
        assert not files.next_folder(box).is_symlink()
        assert not files.next_folder(box).exists()
    assert left(victim) == [".whole", "key"]
    assert sorted(path.name for path in box.iterdir() if path.name[0] != ".") == ["mine"]


@pytest.mark.parametrize("kind", ["a fifo", "endless", "a folder", "bytes"])
def test_a_mark_that_is_no_text_is_none(kind, box):
    planted = box / ".repo.0123abcd.ready"
    for folder in (planted, box):
        folder.mkdir(exist_ok=True)
        if kind == "a fifo":
            os.mkfifo(folder / ".whole")
        elif kind == "endless":
            (folder / ".whole").symlink_to("/dev/zero")
        elif kind == "a folder":
            (folder / ".whole").mkdir()
        else:
            (folder / ".whole").write_bytes(b"\xff\xfe")
    with files.sole_writer(box):
        assert files.current(box, "mine") == box / "mine"
    assert os.path.lexists(box / ".whole")  # somebody's


@pytest.mark.parametrize("there", [True, False])
def test_a_file_in_the_place_of_a_link_replaces_the_link(there, tmp_path):
    victim, link = tmp_path / "victim", tmp_path / "out" / "x.txt"
    link.parent.mkdir()
    if there:
        victim.write_text("mine")
    link.symlink_to(victim)
    files.write_whole(link, "new")
    assert not link.is_symlink()
    assert link.read_text() == "new"
    assert victim.exists() is there
    assert not there or victim.read_text() == "mine"
    assert left(tmp_path) == (["out", "victim"] if there else ["out"])
    (tmp_path / "linked").symlink_to(link.parent)  # the folders above it are as the user typed them
    files.write_whole(tmp_path / "linked" / "x.txt", "newer")
    assert link.read_text() == "newer"
