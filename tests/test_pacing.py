"""A time that is held, and threads that do not help."""

from __future__ import annotations

import pytest
import torch

from normswap.pacing import Budget, OutOfTimeError, Threads


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now

    def take(self, seconds):
        self.now += seconds


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(("slower", "taken"), [(100, 1), (2, 2), (0.5, 2)])
def test_one_thread_is_taken_where_more_are_much_slower(two_threads, slower, taken):
    clock = Clock()

    def run():
        clock.take(0.1 * (slower if torch.get_num_threads() > 1 else 1))

    with Threads(clock) as threads:
        seconds = threads.look(run, enough=1.0)
        assert torch.get_num_threads() == taken
        assert seconds == pytest.approx(0.1 * (1 if taken == 1 else slower))
        assert ("one thread: 2 threads took 100 times" in threads.note) == (taken == 1)
    assert torch.get_num_threads() == 2


def test_a_clock_that_ends_what_reads_it():
    clock = Clock()
    budget = Budget(10.0, clock)
    read = budget.ending(3.0)
    clock.take(3.0)
    assert read() == 3.0
    clock.take(0.1)
    with pytest.raises(OutOfTimeError):
        read()
    read = budget.ending(1000.0)  # never beyond the time for all of it
    clock.take(budget.at_most + 0.1)
    with pytest.raises(OutOfTimeError):
        read()


def test_what_took_longest_is_said_where_it_was_too_long():
    clock = Clock()
    budget = Budget(10.0, clock)
    for stage, seconds in (("planning", 2.0), ("the cost of each target", 9.0)):
        budget.enter(stage)
        clock.take(seconds)
    assert budget.over == ""
    clock.take(5.0)
    assert "took 16 s and not the 10 s asked for" in budget.over
    assert "the cost of each target took 14 s" in budget.over
