"""A sample is given up for the deaths it causes, not for those that happen to it."""

import random
import signal

import pytest

from loaders.workers.strikes import STRIKES, Strikes

KILLED, CRASHED = -signal.SIGKILL, -signal.SIGSEGV


def test_a_sample_that_is_alone_with_its_deaths_is_given_up_at_the_third():
    for exitcode in (KILLED, CRASHED, 3):
        strikes = Strikes()
        assert [strikes.add((0, 5), exitcode) for _ in range(STRIKES)] == [False, False, True]


def test_a_death_over_no_sample_gives_nothing_up():
    strikes = Strikes()
    assert not any(strikes.add(None, KILLED) for _ in range(100))
    assert not strikes.counts


@pytest.mark.parametrize("elsewhere", [None, (0, 9)])
def test_kills_elsewhere_in_between_speak_for_a_sample(elsewhere):
    strikes = Strikes()
    assert not any([strikes.add((0, 5), KILLED), strikes.add(elsewhere, KILLED), strikes.add((0, 5), KILLED)])
    assert not strikes.add((0, 5), KILLED)
    assert strikes.add((0, 5), KILLED)


def test_kills_elsewhere_do_not_speak_for_a_sample_that_crashes():
    strikes = Strikes()
    for _ in range(10):
        strikes.add(None, KILLED)
    assert [strikes.add((0, 5), CRASHED) for _ in range(3)] == [False, False, True]


def test_two_samples_that_kill_their_workers_by_turns_are_both_given_up_soon():
    strikes = Strikes()
    given_up = set()
    for _ in range(6):
        for place in {(0, 5), (0, 9)} - given_up:
            if strikes.add(place, KILLED):
                given_up.add(place)
    assert given_up == {(0, 5), (0, 9)}


def test_a_sample_that_kills_is_given_up_in_the_middle_of_kills_from_outside():
    strikes = Strikes()
    is_at_fault = [strikes.add(place, KILLED) for _ in range(20) for place in (None, (0, 5))]
    assert STRIKES < strikes.counts[0, 5] <= 20
    assert any(is_at_fault)


def test_two_workers_killed_at_random_in_the_middle_of_every_other_sample_cost_no_sample():
    rng = random.Random(1)
    strikes = Strikes()
    reading: list[tuple[int, int] | None] = [(0, 0), (0, 1)]
    following, rests = 2, [0, 0]
    for _ in range(20_000):
        for worker in range(2):
            rests[worker] -= 1
            if rng.random() < 0.5 and rests[worker] <= 0:  # this one was done before the kill came
                reading[worker], following = (0, following), following + 1
        victim = rng.randrange(2)
        place = reading[victim] if rests[victim] <= 0 else None
        assert not strikes.add(place, KILLED)
        if place is not None and strikes.is_last_chance(place, KILLED):
            rests[victim] = 10  # the kills that come while the sample waits


def test_only_a_sample_whose_workers_were_killed_waits_for_its_last_chance():
    strikes = Strikes()
    chances = [strikes.add((0, 5), KILLED) or strikes.is_last_chance((0, 5), KILLED) for _ in range(2)]
    assert chances == [False, True]
    chances = [strikes.add((0, 6), CRASHED) or strikes.is_last_chance((0, 6), CRASHED) for _ in range(2)]
    assert chances == [False, False]
