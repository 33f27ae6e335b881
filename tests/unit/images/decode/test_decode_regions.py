import threading

import cv2
import numpy as np
import pytest
from support.photo_zoo import SAMPLINGS, exif, jpeg, photo, with_exif, zoo

from loaders import image_size, read_image
from loaders.images.decode import nvimagecodec

BACKENDS = [
    "opencv",
    pytest.param(
        "nvimagecodec",
        marks=pytest.mark.skipif(not nvimagecodec.agrees_with_opencv(), reason="nvImageCodec is not installed"),
    ),
]
REDUCED = {
    (mode, scale): getattr(cv2, f"IMREAD_REDUCED_{name}_{scale}")
    for mode, name in (("RGB", "COLOR"), ("GRAY", "GRAYSCALE"))
    for scale in (2, 4, 8)
}


def random_region(rng, width, height):
    across, down = int(rng.integers(1, width + 1)), int(rng.integers(1, height + 1))
    return int(rng.integers(0, width - across + 1)), int(rng.integers(0, height - down + 1)), across, down


def cut(picture, region):
    left, top, width, height = region
    return picture[top : top + height, left : left + width]


def opencv_picture(encoded, mode, flags):
    picture = cv2.imdecode(np.frombuffer(encoded, np.uint8), flags)
    return cv2.cvtColor(picture, cv2.COLOR_BGR2RGB) if mode == "RGB" else picture


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", zoo())
def test_a_region_is_cut_out_of_the_whole_picture_bit_for_bit(name, backend):
    rng = np.random.default_rng(0)
    for mode, flags in (("RGB", cv2.IMREAD_COLOR), ("GRAY", cv2.IMREAD_GRAYSCALE)):
        whole = opencv_picture(zoo()[name], mode, flags)
        if name == "tiff 16 bit":  # OpenCV rounds
            whole = read_image(zoo()[name], mode)
        height, width = whole.shape[:2]
        for region in [(0, 0, width, height), *(random_region(rng, width, height) for _ in range(8))]:
            part = read_image(zoo()[name], mode, region=region, backend=backend)
            assert np.array_equal(part, cut(whole, region)), (mode, region)
            assert part.dtype == np.uint8
            assert part.flags.c_contiguous
            assert part.flags.writeable


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("sampling", [*SAMPLINGS, "grey"])
def test_regions_of_jpegs_of_every_sampling_and_size_are_the_same(sampling, backend):
    # Noise: neighbours differ as much as can be, in colour too, so that no pixel is right by chance.
    rng = np.random.default_rng(1)
    for width, height in [(7, 5), (8, 8), (9, 17), (16, 16), (17, 33), (31, 16), (65, 47), (160, 120)]:
        picture = rng.integers(0, 256, (height, width, 3), np.uint8)
        encoded = jpeg(picture[..., 0].copy()) if sampling == "grey" else jpeg(picture, sampling)
        whole = read_image(encoded)
        regions = [random_region(rng, width, height) for _ in range(20)]
        regions += [(left, height // 3, across, 2) for left in range(0, width - 3, 7) for across in (1, 2, 3)]
        for region in regions:
            part = read_image(encoded, region=region, backend=backend)
            assert np.array_equal(part, cut(whole, region)), (width, height, region)


JPEGS = [name for name in zoo() if name.startswith("jpeg ") and name != "jpeg 2000"]
TURNED = {f"jpeg exif {orientation}{order}" for orientation in range(2, 9) for order in ("", " little-endian")}


@pytest.mark.parametrize("scale", [2, 4, 8])
@pytest.mark.parametrize("name", sorted(set(JPEGS) - TURNED))
def test_a_reduced_region_of_a_jpeg_is_cut_out_of_the_reduced_picture(name, scale):
    rng = np.random.default_rng(2)
    for mode in ("RGB", "GRAY"):
        reduced = opencv_picture(zoo()[name], mode, REDUCED[mode, scale])
        assert np.array_equal(read_image(zoo()[name], mode, scale=scale), reduced)
        width, height = image_size(zoo()[name])
        for left, top, across, down in [random_region(rng, width, height) for _ in range(5)]:
            part = read_image(zoo()[name], mode, region=(left, top, across, down), scale=scale)
            columns = slice(left // scale, -(-(left + across) // scale))
            rows = slice(top // scale, -(-(top + down) // scale))
            assert np.array_equal(part, reduced[rows, columns])


@pytest.mark.parametrize("scale", [2, 4, 8])
@pytest.mark.parametrize("orientation", range(2, 9))
def test_a_reduced_region_of_a_turned_jpeg_has_every_block_that_touches_it(orientation, scale):
    # 136 x 96 is a multiple of every scale, so that blocks counted from any corner are the same.
    encoded = with_exif(jpeg(photo(136, 96)), exif(orientation))
    reduced = opencv_picture(encoded, "RGB", REDUCED["RGB", scale])
    assert np.array_equal(read_image(encoded, scale=scale), reduced)
    rng = np.random.default_rng(3)
    for left, top, across, down in [random_region(rng, *image_size(encoded)) for _ in range(5)]:
        part = read_image(encoded, region=(left, top, across, down), scale=scale)
        columns = slice(left // scale, -(-(left + across) // scale))
        assert np.array_equal(part, reduced[top // scale : -(-(top + down) // scale), columns])


@pytest.mark.parametrize("name", sorted(TURNED))
@pytest.mark.parametrize("scale", [2, 4, 8])
def test_turned_jpegs_of_odd_size_are_reduced_as_opencv_does_it(name, scale):
    assert np.array_equal(
        read_image(zoo()[name], scale=scale), opencv_picture(zoo()[name], "RGB", REDUCED["RGB", scale])
    )


@pytest.mark.parametrize("name", sorted(set(zoo()) - set(JPEGS)))
def test_other_files_are_reduced_to_the_means_of_blocks(name):
    whole = read_image(zoo()[name]).astype(float)
    height, width = whole.shape[:2]
    for scale in (2, 4, 8):
        filled = np.pad(whole, ((0, -height % scale), (0, -width % scale), (0, 0)), mode="edge")
        means = filled.reshape(filled.shape[0] // scale, scale, -1, scale, 3).mean((1, 3))
        assert np.abs(read_image(zoo()[name], scale=scale) - means).max() <= 0.5
        part = read_image(zoo()[name], region=(19, 13, width - 19, 40), scale=scale)
        assert np.abs(part - means[13 // scale : -(-53 // scale), 19 // scale :]).max() <= 0.5


@pytest.mark.parametrize("name", ["jpeg 420", "jpeg exif 6", "png", "ppm"])
@pytest.mark.parametrize("change", [(-1, 0, 0, 0), (0, -1, 0, 0), (1, 0, 0, 0), (0, 1, 0, 0), (0, 0, -999, 0)])
def test_a_region_outside_of_the_picture_is_refused_with_the_size(name, change):
    width, height = image_size(zoo()[name])
    left, top, across, down = change
    for scale in (1, 4):
        with pytest.raises(ValueError, match=f"is not inside the picture of {width} x {height} pixels"):
            read_image(zoo()[name], region=(left, top, max(width + across, 0), height + down), scale=scale)


def test_a_region_of_numpy_integers_is_as_good_and_one_of_floats_is_refused():
    region = np.array([5, 6, 20, 30])
    assert np.array_equal(read_image(zoo()["jpeg 420"], region=region), read_image(zoo()["jpeg 420"])[6:36, 5:25])
    with pytest.raises(TypeError, match="integer"):
        read_image(zoo()["jpeg 420"], region=(5.0, 6.0, 20.0, 30.0))


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"scale": 3}, "scale 3 is unknown; use 1, 2, 4 or 8"),
        ({"backend": "pillow"}, 'backend \'pillow\' is unknown; use None, "opencv", "nvimagecodec" or "restarts"'),
    ],
)
def test_unknown_arguments_are_told_what_is_known(wrong, told):
    with pytest.raises(ValueError, match=told):
        read_image(zoo()["png"], **wrong)


def test_a_path_is_read_like_its_bytes(tmp_path):
    path = tmp_path / "photo.png"  # and is none
    path.write_bytes(zoo()["jpeg exif 8"])
    for options in ({}, {"region": (3, 5, 40, 60)}, {"region": (3, 5, 40, 60), "scale": 2}):
        assert np.array_equal(read_image(path, **options), read_image(zoo()["jpeg exif 8"], **options))


@pytest.mark.parametrize("backend", BACKENDS)
def test_four_threads_at_once_read_the_same(backend):
    def read_all():
        rng = np.random.default_rng(4)
        files = [zoo()[name] for name in rng.permutation(sorted(zoo()))]
        return [
            read_image(file, region=random_region(rng, *image_size(file)), scale=int(scale), backend=backend)
            for file, scale in zip(files, rng.choice([1, 1, 2, 8], len(files)), strict=True)
        ]

    expected, results = read_all(), {}
    start = threading.Barrier(4)

    def run(number):
        start.wait(30)
        results[number] = [read_all() for _ in range(3)]

    threads = [threading.Thread(target=run, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert sorted(results) == [0, 1, 2, 3]
    for rounds in results.values():
        for parts in rounds:
            assert all(np.array_equal(part, one) for part, one in zip(parts, expected, strict=True))
