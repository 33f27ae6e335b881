"""The benchmark of annotations and crops, small: a table in arrays costs a forked worker next to nothing."""

from __future__ import annotations

import sys

import pytest

from benchmarks import detection

BOXES, PICTURES = 80_000, 10_000


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="private memory is read from /proc")
def test_reading_all_annotations_copies_no_page_of_the_table_in_a_forked_worker():
    arrays = detection.growth("arrays", BOXES, PICTURES)["grown_nbytes"]
    dicts = detection.growth("dicts", BOXES, PICTURES)["grown_nbytes"]
    assert arrays < 2e6  # what Python itself takes to read them; the table has 3.4 MB
    assert dicts > 10e6
    assert dicts > 8 * arrays


def test_ten_crops_cost_one_decoding():
    figures = detection.crops((500, 375), photos=2, repeats=3)
    assert figures["ten_decoding_ms"] < figures["alone_decoding_ms"] / 3  # a tenth; noise aside
    assert figures["ten_ms"] < figures["alone_ms"]
