"""Which JPEGs are decoded by their segments, and which are not touched; damage never gives pixels of its own."""

import struct

import numpy as np
import pytest
from support.photo_zoo import SAMPLINGS, exif, jpeg, photo, segment, with_segments, zoo

from loaders import DecodeError, read_image
from loaders.images.decode import image, restart
from loaders.images.decode.jpeg import metadata, parts_that_decode, read_jpeg_header
from loaders.images.decode.restart import find_restarts

REGION = (20, 30, 70, 50)


def restarts_of(data):
    return find_restarts(data, read_jpeg_header(data))


def scan_of(data):
    """(before the scan, its segments without markers): `joined` puts them together again."""
    at = read_jpeg_header(data).scan_at
    content, segments, begin = data[at:-2], [], 0
    for end in range(len(content) - 1):
        if content[end] == 0xFF and 0xD0 <= content[end + 1] <= 0xD7:
            segments.append(content[begin:end])
            begin = end + 2
    return data[:at], [*segments, content[begin:]]


def joined(head, segments, numbers=None):
    markers = [bytes([0xFF, 0xD0 + number % 8]) for number in numbers or range(len(segments) - 1)]
    return head + b"".join(part + marker for part, marker in zip(segments, [*markers, b"\xff\xd9"], strict=True))


def patched(data, at, content):
    return data[:at] + content + data[at + len(content) :]


GOOD = jpeg(photo(), "420", restart=3)
FRAME_AT = GOOD.index(b"\xff\xc0")
HEAD, SEGMENTS = scan_of(GOOD)
COUNT = len(SEGMENTS)


def test_the_pieces_of_these_tests_are_a_jpeg():
    assert joined(HEAD, SEGMENTS) == GOOD
    assert COUNT == 21
    assert restarts_of(GOOD) is not None


NO_GRID = {
    "no markers": jpeg(photo(), "420"),
    "an interval that divides no row": jpeg(photo(), "420", restart=4),
    "an interval of two rows": jpeg(photo(), "420", restart=18),
    "progressive": jpeg(photo(), "420", progressive=True, restart=3),
    "arithmetic codes": patched(GOOD, FRAME_AT + 1, b"\xc9"),
    "12 bits": patched(GOOD, FRAME_AT + 4, b"\x0c"),
    "two markers exchanged": joined(HEAD, SEGMENTS, [0, 2, 1, *range(3, COUNT - 1)]),
    "a number twice": joined(HEAD, SEGMENTS, [0, 0, *range(2, COUNT - 1)]),
    "numbers from 1": joined(HEAD, SEGMENTS, range(1, COUNT)),
    "a marker missing": joined(HEAD, [SEGMENTS[0] + SEGMENTS[1], *SEGMENTS[2:]]),
    "a segment missing": joined(HEAD, SEGMENTS[:5] + SEGMENTS[6:]),
    "a segment twice": joined(HEAD, SEGMENTS[:5] + SEGMENTS[4:]),
    "eight segments missing": joined(HEAD, SEGMENTS[:3] + SEGMENTS[11:]),
    "eight segments twice": joined(HEAD, SEGMENTS[:12] + SEGMENTS[4:]),
    "fill before a marker": joined(HEAD, [SEGMENTS[0] + b"\xff", *SEGMENTS[1:]]),
    "a marker in a segment": joined(HEAD, [SEGMENTS[0][:9] + b"\xff\xd0" + SEGMENTS[0][9:], *SEGMENTS[1:]]),
    "another marker in the scan": joined(HEAD, [SEGMENTS[0] + segment(0xFE, b"no"), *SEGMENTS[1:]]),
    "a marker at the end": GOOD[:-2] + b"\xff\xd4\xff\xd9",
    "a second scan": GOOD[:-2] + HEAD[HEAD.index(b"\xff\xda") :] + SEGMENTS[0] + b"\xff\xd9",
    "a higher frame": patched(GOOD, FRAME_AT + 5, struct.pack(">H", 160)),
    "a lower frame": patched(GOOD, FRAME_AT + 5, struct.pack(">H", 80)),
    "a narrower frame": patched(GOOD, FRAME_AT + 7, struct.pack(">H", 96)),
    "an interval that is not told": GOOD.replace(segment(0xDD, b"\0\3"), b""),
    "another interval than is told": GOOD.replace(segment(0xDD, b"\0\3"), segment(0xDD, b"\0\1")),
    "no end": GOOD[:-2],
    "cut": GOOD[:-400],
}


@pytest.mark.parametrize("name", NO_GRID)
def test_what_is_no_grid_of_segments_is_decoded_as_ever(name, capfd):
    data = NO_GRID[name]
    assert data != GOOD
    assert restarts_of(data) is None
    try:
        whole = read_image(data, backend="opencv")
    except DecodeError:
        with pytest.raises(DecodeError):
            read_image(data, region=(20, 30, 30, 20))
    else:
        np.testing.assert_array_equal(read_image(data, region=(20, 30, 30, 20)), whole[30:50, 20:50])


def test_segments_that_run_over_the_end_of_a_row_are_no_grid_even_if_their_number_fits():
    data = jpeg(photo(112, 32), "420", restart=4)  # two rows of seven MCUs: four segments, as two rows of two are
    assert data.count(b"\xff\xd2") == 1
    assert b"\xff\xd3" not in data
    assert restarts_of(data) is None
    np.testing.assert_array_equal(read_image(data, region=(3, 17, 99, 9)), read_image(data)[17:26, 3:102])


def test_a_header_of_many_kilobytes_is_not_kept():
    thumbnails = [segment(0xE0, b"JFIF\0\1\1\0\0\1\0\1\0\0" + bytes(40_000)) for _ in range(2)]
    data = with_segments(GOOD, *thumbnails)
    assert restarts_of(data) is None
    np.testing.assert_array_equal(read_image(data, region=REGION), read_image(GOOD)[30:80, 20:90])


@pytest.mark.parametrize("window", [(0, 7, 0, 3), (0, 1, 0, 1), (2, 5, 1, 3), (6, 7, 2, 3), (1, 4, 0, 2)])
def test_what_is_spliced_is_a_jpeg_in_order_itself(window):
    found, window = restarts_of(GOOD), restart.Window(*window)
    starts, ends = found.ranges(window)
    spliced = found.splice(window, bytearray().join(GOOD[start:end] for start, end in zip(starts, ends, strict=True)))
    assert spliced.endswith(b"\xff\xd9")
    assert restarts_of(spliced).grid == (window.bottom - window.top, window.right - window.left)


@pytest.mark.parametrize("tail", [b"\0" * 50, GOOD, b"\xff\xd0\xff"])
def test_what_follows_the_picture_is_left_alone(tail):
    assert restarts_of(GOOD + tail).anchors.tolist() == restarts_of(GOOD).anchors.tolist()


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_a_marker_per_row_as_cameras_write_them_is_enough(sampling):
    per_row = -(-131 // {"444": 8, "422": 16, "420": 16, "440": 8, "411": 32}[sampling])
    data = jpeg(photo(), sampling, restart=per_row)
    assert restarts_of(data).grid[1] == 1
    np.testing.assert_array_equal(read_image(data, region=REGION, backend="restarts"), read_image(data)[30:80, 20:90])


@pytest.fixture
def decoders(monkeypatch):
    """Which decoders are asked for regions."""
    asked, window, opencv = [], image.EncodedImage._read_window, image.opencv.decode_jpeg_region

    def read_window(*arguments):
        asked.append("restarts")
        return window(*arguments)

    def decode(data, *arguments):
        asked.append(len(data))
        return opencv(data, *arguments)

    monkeypatch.setattr(image.EncodedImage, "_read_window", read_window)
    monkeypatch.setattr(image.opencv, "decode_jpeg_region", decode)
    return asked


def test_regions_are_decoded_by_segments_unless_another_backend_is_asked_for(decoders):
    read_image(GOOD, region=(20, 30, 8, 8))
    assert decoders[0] == "restarts"
    assert decoders[1] < len(GOOD) / 2
    decoders.clear()
    read_image(GOOD, region=(20, 30, 8, 8), backend="opencv")
    assert decoders == [len(GOOD)]
    decoders.clear()
    read_image(zoo()["jpeg 420"], region=(20, 30, 8, 8), backend="restarts")
    assert decoders == [len(zoo()["jpeg 420"])]


@pytest.mark.parametrize("region", [None, (0, 0, 131, 97), (0, 0, 131, 95)])
def test_the_whole_picture_is_not_taken_apart(decoders, region):
    read_image(GOOD, region=region)
    assert "restarts" not in decoders


def test_a_window_that_opencv_refuses_is_cut_from_the_whole_picture(monkeypatch):
    whole, splice = read_image(GOOD), restart.Restarts.splice
    monkeypatch.setattr(restart.Restarts, "splice", lambda *arguments: splice(*arguments)[:200])
    np.testing.assert_array_equal(read_image(GOOD, region=REGION, backend="restarts"), whole[30:80, 20:90])


def test_metadata_is_left_out_of_windows_and_what_tells_the_colours_is_not():
    adobe, oriented = segment(0xEE, b"Adobe\0\x64\0\0\0\0\1"), segment(0xE1, b"Exif\0\0" + exif(1))
    comment, thumbnail = segment(0xFE, b"said"), segment(0xE0, b"JFXX\0\x10" + bytes(30))
    data = with_segments(GOOD, adobe, oriented, thumbnail, comment)
    header = read_jpeg_header(GOOD)
    kept, size_at = parts_that_decode(data, read_jpeg_header(data))
    assert kept == GOOD[:2] + adobe + HEAD[2:]
    assert kept[size_at : size_at + 4] == struct.pack(">HH", 97, 131)
    assert metadata(data, read_jpeg_header(data)) == [oriented, comment]
    assert metadata(GOOD, header) == []


# -- damage


def mutated(data, rng):
    """Damage to the entropy-coded bytes, mostly: bits, bytes, markers; bytes lost and come; segments exchanged."""
    damaged, scan = bytearray(data), read_jpeg_header(data).scan_at
    for _ in range(int(rng.integers(1, 4))):
        at = int(rng.integers(0 if rng.random() < 0.1 else scan, len(damaged) - 2))
        match rng.integers(6):
            case 0:
                damaged[at] ^= 1 << rng.integers(8)
            case 1:
                damaged[at] = rng.integers(256)
            case 2:
                del damaged[at]
            case 3:
                damaged[at:at] = rng.bytes(1)
            case 4:
                damaged[at : at + 2] = bytes((0xFF, 0xD0 + rng.integers(8)))
            case 5:
                other = int(rng.integers(scan, len(damaged) - 2))
                damaged[at : at + 40], damaged[other : other + 40] = damaged[other : other + 40], damaged[at : at + 40]
    return bytes(damaged)


@pytest.mark.parametrize("seed", range(4))
def test_thousands_of_damaged_files_give_what_decoding_everything_gives(seed, monkeypatch, capfd):
    spliced, splice = [], restart.Restarts.splice

    def noted(self, window, pieces):
        spliced.append(splice(self, window, pieces))
        return spliced[-1]

    monkeypatch.setattr(restart.Restarts, "splice", noted)
    monkeypatch.setattr(image, "_MOST", 2)
    rng, pictures, refused = np.random.default_rng(seed), 0, 0
    intervals = {"444": 1, "422": 3, "420": 9, "440": 17, "411": 5}
    files = [jpeg(photo(name="coffee"), sampling, restart=interval) for sampling, interval in intervals.items()]
    for number in range(900):
        damaged = mutated(files[number % len(files)], rng)
        left, top = int(rng.integers(130)), int(rng.integers(96))
        region = (left, top, int(rng.integers(1, 132 - left)), int(rng.integers(1, 98 - top)))
        try:
            whole = read_image(damaged, backend="opencv")
        except DecodeError:
            whole = None
        try:
            part = read_image(damaged, region=region, backend="restarts")
        except (DecodeError, ValueError):  # ValueError: the header has another size now
            part = None
        if whole is None or whole.shape != (97, 131, 3):
            refused += 1
            assert part is None or part.shape[:2] == (region[3], region[2])
            continue
        pictures += 1
        np.testing.assert_array_equal(part, whole[top : top + region[3], left : left + region[2]], str(number))
    assert pictures > 300
    assert len(spliced) > 100


@pytest.mark.parametrize("seed", range(2))
def test_damage_elsewhere_leaves_a_window_as_it_was(seed, capfd):
    rng, whole = np.random.default_rng(seed), read_image(GOOD)
    for _ in range(100):
        broken = list(SEGMENTS)
        row = int(rng.integers(3, 7))  # of seven, three segments each; the window lies in the first two
        at = 3 * row + int(rng.integers(3))
        broken[at] = rng.integers(0, 0xFF, len(broken[at]), np.uint8).tobytes()
        part = read_image(joined(HEAD, broken), region=(3, 4, 120, 25))
        np.testing.assert_array_equal(part, whole[4:29, 3:123])


def test_markers_of_the_right_numbers_in_the_wrong_places_are_refused(monkeypatch):
    monkeypatch.setattr(restart, "_ANCHORS_NBYTES", 1)
    known = restarts_of(GOOD)
    assert known.stride == 1
    window = restart.Window(0, 1, 1, 2)

    def splice(anchors):
        begin, end = (places[0] for places in known._replace(anchors=anchors).ranges(window))
        return known._replace(anchors=anchors).splice(window, bytearray(GOOD[begin:end]))

    assert splice(known.anchors) is not None
    # The segment that comes eight later has the same numbers around it.
    shifted = known.anchors.copy()
    shifted[1], shifted[2] = known.anchors[9] - 5, known.anchors[10] + 5
    assert splice(shifted) is None
