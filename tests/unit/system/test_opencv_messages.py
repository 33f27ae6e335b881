import os
import re
import subprocess
import sys

import cv2
import pytest

from loaders import DecodeError, read_image
from loaders.system.opencv_messages import no_messages


def test_opencvs_messages_come_back_after_decoding(capfd):
    before = cv2.utils.logging.getLogLevel()
    with no_messages, no_messages:
        assert cv2.utils.logging.getLogLevel() == cv2.utils.logging.LOG_LEVEL_SILENT
    assert cv2.utils.logging.getLogLevel() == before
    with pytest.raises(DecodeError):
        read_image(b"II*\0" + bytes(99))
    assert cv2.utils.logging.getLogLevel() == before
    assert capfd.readouterr().err == ""


def test_a_user_who_asks_opencv_for_details_gets_them():
    before = cv2.utils.logging.getLogLevel()
    try:
        cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_INFO)
        with no_messages:
            assert cv2.utils.logging.getLogLevel() == cv2.utils.logging.LOG_LEVEL_INFO
    finally:
        cv2.utils.logging.setLogLevel(before)


FORK = """
import os, cv2
from loaders.system.opencv_messages import no_messages
with no_messages:
    child = os.fork()
    if not child:
        silent = cv2.utils.logging.getLogLevel()
        with no_messages:
            pass
        os._exit(10 * silent + cv2.utils.logging.getLogLevel())
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), cv2.utils.logging.getLogLevel())
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_a_process_forked_while_a_thread_decodes_is_not_silent_for_good():
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", FORK], capture_output=True, text=True, check=True)
    in_child, level = map(int, re.findall(r"\d+", done.stdout))
    assert in_child == 11 * level
