"""What travels between the loader and its workers."""

import pytest

from loaders.workers.messages import Failure


def failure_of(message):
    try:
        raise ValueError(message)
    except ValueError as error:
        return Failure.of(error, "reading")


@pytest.mark.parametrize("message", ["x" * 50_000_000, "x" * 1_000_000 + "\nand more"])
def test_the_summary_of_an_enormous_message_is_short(message):
    summary = failure_of(message).summary
    assert len(summary) < 1000
    assert summary.startswith("ValueError: xxx")
    assert summary.endswith("characters)")


def test_the_summary_of_a_usual_message_is_its_first_line():
    assert failure_of("one\ntwo").summary == "ValueError: one"
