import os
import re
import subprocess
import sys
import threading

import cv2
import pytest

from loaders import DecodeError, read_image
from loaders.system.opencv_messages import log_level, no_messages

set_log_level = (cv2 if hasattr(cv2, "setLogLevel") else cv2.utils.logging).setLogLevel


def test_opencvs_messages_come_back_after_decoding(capfd):
    before = log_level()
    with no_messages:
        assert log_level() == 0
    assert log_level() == before
    with pytest.raises(DecodeError):
        read_image(b"II*\0" + bytes(99))
    assert log_level() == before
    assert capfd.readouterr().err == ""


def test_threads_that_decode_together_go_back_when_the_last_is_done():
    before = log_level()
    inside, done = threading.Event(), threading.Event()

    def decode():
        with no_messages:
            inside.set()
            done.wait(10)

    thread = threading.Thread(target=decode)
    thread.start()
    assert inside.wait(10)
    with no_messages:
        pass
    assert log_level() == 0
    done.set()
    thread.join()
    assert log_level() == before


def test_an_interrupt_on_the_way_out_is_made_good_by_the_next_picture():
    before = log_level()
    no_messages.__enter__()  # and never out
    assert log_level() == 0
    with no_messages:
        assert log_level() == 0
    assert log_level() == before


def test_a_user_who_asks_opencv_for_details_gets_them():
    before = log_level()
    try:
        set_log_level(4)
        with no_messages:
            assert log_level() == 4
    finally:
        set_log_level(before)


FORK = """
import os
from loaders.system.opencv_messages import log_level, no_messages
with no_messages:
    child = os.fork()
    if not child:
        silent = log_level()
        with no_messages:
            pass
        os._exit(10 * silent + log_level())
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), log_level())
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_a_process_forked_while_a_thread_decodes_is_not_silent_for_good():
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", FORK], capture_output=True, text=True, check=True)
    in_child, level = map(int, re.findall(r"\d+", done.stdout))
    assert in_child == 11 * level
