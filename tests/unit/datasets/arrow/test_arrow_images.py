"""Images in tables: decoded, cropped straight into the batch, null, damaged."""

from __future__ import annotations

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.feather as feather
import pyarrow.parquet as pq
import pytest
from support.photo_zoo import jpeg, photo

from loaders import ArrowDataset, CenterCrop, DataLoader, DatasetError, DecodeError, SampleError, read_image
from loaders.images.patches import RandomPatches


def write(path, what, kind, group=4):
    if kind == "parquet":
        pq.write_table(what, path, row_group_size=group)
    else:
        feather.write_feather(what, path, compression=kind, chunksize=group)
    return path


def photos(rows=6):
    return [jpeg(photo(60 + 2 * row, 50)) for row in range(rows)]


def images(tmp_path, form, rows=6):
    encoded = photos(rows)
    if form == "bytes":
        column = pa.array(encoded)
    elif form == "large":
        column = pa.array(encoded, pa.large_binary())
    else:
        given = [
            {"bytes": data if form == "struct" or row % 2 else None, "path": None} for row, data in enumerate(encoded)
        ]
        for row, data in enumerate(encoded):
            if given[row]["bytes"] is None:
                (tmp_path / f"{row}.jpg").write_bytes(data)
                given[row]["path"] = str(tmp_path / f"{row}.jpg")
        column = pa.array(given, pa.struct({"bytes": pa.binary(), "path": pa.string()}))
    return pa.table({"photo": column, "label": list(range(rows))})


@pytest.mark.parametrize("form", ["bytes", "large", "struct", "paths"])
@pytest.mark.parametrize("kind", ["parquet", "uncompressed"])
def test_images_are_decoded_whole_or_cropped_straight_into_the_batch(tmp_path, form, kind):
    path = write(tmp_path / "file", images(tmp_path, form), kind, 4)
    whole, crop = ArrowDataset(path, image="photo"), CenterCrop(32, resize=40)
    cropped = ArrowDataset(path, image="photo", crop=crop)
    for row, data in enumerate(photos()):
        np.testing.assert_array_equal(whole[row]["photo"], read_image(data))
        np.testing.assert_array_equal(cropped[row]["photo"], crop.read(data))
    assert hasattr(cropped, "read_into")
    assert not hasattr(whole, "read_into")
    for workers in (0, 2):
        [batch] = DataLoader(cropped, 6, num_workers=workers)
        np.testing.assert_array_equal(batch["photo"], [crop.read(data) for data in photos()])
        assert batch["label"].tolist() == list(range(6))


def test_slices_and_null_structs_of_images(tmp_path):
    struct = images(tmp_path, "struct")["photo"].chunk(0)
    mask = pa.array([False, False, True, False, False, False])
    struct = pa.StructArray.from_arrays([struct.field(0), struct.field(1)], fields=list(struct.type), mask=mask)
    for first in (0, 1, 2):
        dataset = ArrowDataset(pa.table({"photo": struct}).slice(first), image="photo")
        with pytest.raises(SampleError, match='column "photo" is null'):
            dataset[2 - first]
        for row in (3, 5):
            np.testing.assert_array_equal(dataset[row - first]["photo"], read_image(photos()[row]))


@pytest.mark.parametrize("column", ["binary", "bytes", "path", "binary view"])
def test_images_whose_offsets_are_damaged_in_a_mapped_file_are_errors(tmp_path, column):
    encoded = photos()
    if column == "binary":
        array = whole = pa.array(encoded)
    elif column == "binary view":
        array = whole = pa.array(encoded, pa.binary_view())
    else:
        given = [{"bytes": data, "path": f"{row}{'x' * row}"} for row, data in enumerate(encoded)]
        whole = pa.array(given, pa.struct({"bytes": pa.binary(), "path": pa.string()}))
        array = whole.field(column)
    path = tmp_path / "file"
    what = pa.table({"photo": whole})
    with pa.ipc.new_file(path, what.schema) as writer:
        writer.write_table(what)
    data = bytearray(path.read_bytes())
    places = array.buffers()[1].to_pybytes()[: 16 * len(encoded) if column == "binary view" else 4 * len(encoded) + 4]
    start = data.index(places)
    # The number of the buffer, and an offset in the middle.
    at = start + (16 * 2 + 8 if column == "binary view" else 4 * 3)
    data[at : at + 4] = (2**30).to_bytes(4, "little")
    path.write_bytes(data)
    dataset = ArrowDataset(path, image="photo")
    with pytest.raises(SampleError, match='column "photo" is damaged') as caught:
        dataset[2]
    assert caught.value.index == 2
    if column != "binary view":
        np.testing.assert_array_equal(dataset[0]["photo"], read_image(encoded[0]))


def test_images_are_normalised_and_patched_as_those_of_files(tmp_path):
    norm = ((0.5, 0.4, 0.3), (0.2, 0.2, 0.3))
    dataset = ArrowDataset(images(tmp_path, "bytes"), image="photo", crop=CenterCrop(16, resize=20), normalize=norm)
    pixels = CenterCrop(16, resize=20).read(photos()[3]) / 255
    expected = ((pixels - norm[0]) / norm[1]).transpose(2, 0, 1).astype(np.float32)
    np.testing.assert_allclose(dataset[3]["photo"], expected, atol=1e-6)
    np.testing.assert_array_equal(next(iter(DataLoader(dataset, 6)))["photo"][3], dataset[3]["photo"])
    patches = ArrowDataset(images(tmp_path, "bytes"), image="photo", crop=RandomPatches(16, per_photo=4))
    assert (len(patches), patches.group_sizes.tolist(), patches[9]["label"]) == (24, [24], 2)


def test_an_image_that_is_damaged_or_missing_names_its_sample(tmp_path):
    what = images(tmp_path, "bytes")
    broken = [*photos()[:2], photos()[2][:300], None, *photos()[4:]]
    what = what.set_column(0, "photo", [broken])
    dataset = ArrowDataset(write(tmp_path / "file", what, "parquet"), image="photo", crop=CenterCrop(16, resize=20))
    with pytest.raises(DecodeError, match="sample 2"):
        dataset[2]
    with pytest.raises(SampleError, match=r'sample 3 .*row 3"\), field "photo": column "photo" is null'):
        dataset[3]


@pytest.mark.parametrize("options", [{"crop": CenterCrop(8)}, {"normalize": ((0.5,) * 3, (0.5,) * 3)}])
def test_a_crop_needs_to_know_the_column_of_images(tmp_path, options):
    with pytest.raises(DatasetError, match="Name the column of images with image="):
        ArrowDataset(images(tmp_path, "bytes"), **options)


def test_a_png_is_an_image_as_well():
    pixels = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
    data = cv2.imencode(".png", pixels)[1].tobytes()
    assert np.array_equal(ArrowDataset(pa.table({"image": [data]}), image="image")[0]["image"], pixels[:, :, ::-1])
