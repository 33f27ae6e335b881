import io

import pytest
from rich.console import Console

from examples.demo.display import Display
from examples.demo.record import EpochRecord, WindowRecord, samples_per_s, waiting_share

WINDOWS = [WindowRecord(seconds=1.0, waited_s=0.5, samples=100, loss=2.0), WindowRecord(3.0, 0.5, 300, 1.25)]


def test_rate_and_waiting_are_over_the_whole_time():
    assert samples_per_s(WINDOWS) == 100
    assert waiting_share(WINDOWS) == 0.25


def test_a_pipe_gets_one_plain_line_for_each_epoch():
    text = io.StringIO()
    with Display(Console(file=text), epochs=2, samples=400) as display:
        display.start_epoch()
        for window in WINDOWS:
            display.show_window(window)
        assert text.getvalue() == ""
        display.end_epoch(EpochRecord(WINDOWS, 0.5))
    assert text.getvalue() == "epoch 1/2     100 samples/s  waiting  25%  loss 1.250  accuracy  50.0%\n"


def test_a_terminal_sees_the_bar_move_and_gets_its_cursor_back_even_after_ctrl_c():
    text = io.StringIO()
    console = Console(file=text, force_terminal=True, width=100)

    def interrupted():
        with Display(console, epochs=2, samples=400) as display:
            display.start_epoch()
            display.show_window(WINDOWS[0])
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    shown = text.getvalue()
    assert "100 samples/s  waiting  50%  loss 2.000" in shown
    assert 0 <= shown.index("\x1b[?25l") < shown.rindex("\x1b[?25h")
