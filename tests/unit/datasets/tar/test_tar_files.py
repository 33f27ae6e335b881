"""What a sample of tar shards is, how its image is cropped and written."""

from __future__ import annotations

import io
import json
import os

import numpy as np
import pytest
import torch
from support.photo_zoo import jpeg, photo, zoo
from support.tars import write_photos, write_tar

from loaders import (
    CenterCrop,
    DataLoader,
    DatasetError,
    DecodeError,
    ImageFiles,
    MultiCrop,
    RandomPatches,
    RandomResizedCrop,
    TarFiles,
    read_image,
)
from loaders.images.decode.restart_index import index_of
from loaders.randomness.streams import enter_sample, leave_sample

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def npy(array, **options):
    file = io.BytesIO()
    np.save(file, array, **options)
    return file.getvalue()


@pytest.fixture
def root(tmp_path):
    write_photos(tmp_path)
    return tmp_path


def double_label(sample):
    return {**sample, "label": sample["label"] * 2}


def brightness(content):
    return int(read_image(content, "GRAY").mean())


def one_sample(tmp_path, entries, fields=None, **options):
    return TarFiles(write_tar(tmp_path / "one.tar", entries), fields, **options)[0]


# -- samples


def test_images_are_image_and_classes_are_label_without_a_word(root):
    dataset = TarFiles(root / "*.tar")
    assert (len(dataset), dataset.group_sizes.tolist(), len(dataset.shards)) == (12, [5, 5, 2], 3)
    for number in range(12):
        sample = dataset[number]
        assert list(sample) == ["image", "label"]
        np.testing.assert_array_equal(sample["image"], read_image(root / "files" / f"{number:02}.jpg"))
        assert type(sample["label"]) is int
        assert sample["label"] == 3 * number
    assert dataset.describe(7) == f"{root}/001.tar/07"
    assert repr(dataset) == "TarFiles(12 samples in 3 shards: image, label)"


def test_members_are_decoded_by_the_last_part_of_their_extension(tmp_path):
    entries = [
        ("k/0.left.png", zoo()["png"]),
        ("k/0.cls", b"7\n"),
        ("k/0.cls2", b"8"),
        ("k/0.json", b'{"a": [1, 2.5, null]}'),
        ("k/0.boxes.npy", npy(np.eye(3, dtype=np.float32))),
        ("k/0.TXT", "größe".encode()),
        ("k/0.bin", b"\0\1"),
    ]
    sample = one_sample(tmp_path, entries)
    assert list(sample) == ["left.png", "label", "cls2", "json", "boxes.npy", "txt", "bin"]
    np.testing.assert_array_equal(sample["left.png"], read_image(zoo()["png"]))
    np.testing.assert_array_equal(sample["boxes.npy"], np.eye(3, dtype=np.float32))
    others = [sample[name] for name in ("label", "cls2", "json", "txt", "bin")]
    assert others == [7, 8, {"a": [1, 2.5, None]}, "größe", b"\0\1"]


def test_fields_name_members_alternatives_and_decoders(tmp_path):
    path = write_tar(
        tmp_path / "0.tar",
        [
            ("0.png", zoo()["png"]),
            ("0.seg.png", zoo()["png grey"]),
            ("0.json", b"[3]"),
            ("1.json", b"[4]"),
            ("1.jpg", zoo()["jpeg 420"]),
            ("1.png", zoo()["png grey"]),
            ("1.seg.png", zoo()["png grey"]),
        ],
    )
    fields = {
        "which": "__key__",
        "mean": ("seg.png", brightness),
        "image": ".JPG; png",
        "raw": ("json", bytes),
        "n": ("json", json.loads),
        "where": "__url__",
    }
    zero, one = TarFiles(path, fields)
    assert set(zero) == set(fields)
    np.testing.assert_array_equal(zero["image"], read_image(zoo()["png"]))
    np.testing.assert_array_equal(one["image"], read_image(zoo()["jpeg 420"]))
    assert (zero["which"], one["raw"], one["n"], one["where"]) == ("0", b"[4]", [4], str(path))
    assert zero["mean"] == brightness(zoo()["png grey"])


def test_a_sample_that_lacks_a_field_is_named_when_the_dataset_is_made(tmp_path):
    path = write_tar(
        tmp_path / "0.tar", [("0.jpg", b""), ("0.cls", b""), ("1.jpg", b""), ("2.cls", b""), ("2.png", b"")]
    )
    with pytest.raises(DatasetError, match=rf'1 of 3 samples have no member for field "label" \(cls\).*"{path}/1"'):
        TarFiles(path)
    with pytest.raises(DatasetError, match=r'1 of 3 samples have no member for field "x" \(jpg\).*/2".*\n.*fields='):
        TarFiles(path, {"x": "jpg"})
    with pytest.raises(
        DatasetError, match=r'"depth" \(exr\).*the shards have members with the extensions jpg, cls, png'
    ):
        TarFiles(path, {"depth": "exr"})
    assert len(TarFiles(path, {"image": "jpg;png"})) == 3


def test_samples_that_lack_a_field_are_left_out_on_request_counted_and_listed(tmp_path):
    for shard in range(3):
        entries = [(f"{n}.cls", b"%d" % (10 * shard + n)) for n in range(6) if (n + shard) % 3]
        write_tar(tmp_path / f"{shard}.tar", [*entries, *((f"{n}.txt", b"%d" % n) for n in range(6) if n != 4)])
    path = tmp_path / "*.tar"
    dataset = TarFiles(path, {"label": "cls", "key": "__key__"}, incomplete="skip", index=tmp_path / "index")
    kept = [10 * shard + n for shard in range(3) for n in range(6) if (n + shard) % 3]
    assert sorted(sample["label"] for sample in dataset) == kept
    assert all(int(sample["key"]) == sample["label"] % 10 for sample in dataset)
    assert dataset.group_sizes.tolist() == [4, 4, 4]
    assert list(dataset.skipped) == [
        f"{tmp_path}/{each}" for each in ("0.tar/0", "0.tar/3", "1.tar/2", "1.tar/5", "2.tar/1")
    ]
    assert "12 samples in 3 shards, 5 skipped" in repr(dataset)
    again = TarFiles(path, {"label": "cls"}, incomplete="skip", index=tmp_path / "index")
    assert [sample["label"] for sample in again] == [sample["label"] for sample in dataset]
    with pytest.raises(DatasetError, match=r'no member for field "x" \(jpg\)'):
        TarFiles(path, {"x": "jpg"}, incomplete="skip")
    with pytest.raises(ValueError, match="incomplete='ignore' is unknown"):
        TarFiles(path, incomplete="ignore")


def test_samples_of_which_each_lacks_something_are_none(tmp_path):
    path = write_tar(tmp_path / "0.tar", [("0.jpg", b""), ("1.cls", b"")])
    with pytest.raises(DatasetError, match="no sample with all of image, label"):
        TarFiles(path, incomplete="skip")
    with pytest.raises(DatasetError, match="1 shards have no samples: a member needs a name with an extension"):
        TarFiles(write_tar(tmp_path / "1.tar", [("README", b"")]))


def test_without_fields_two_images_of_a_sample_are_ambiguous(tmp_path):
    path = write_tar(tmp_path / "0.tar", [("0.jpg", b""), ("1.jpg", b""), ("1.png", b"")])
    with pytest.raises(DatasetError, match=r'1 of 2 samples have 2 members, not one, for field "image" \(jpg; png\)'):
        TarFiles(path)


@pytest.mark.parametrize("fields", ["jpg", {}, {"image": 3}, {"image": ("jpg", 3)}, {"image": ("jpg", "png", "gif")}])
def test_fields_of_another_kind_are_refused(root, fields):
    with pytest.raises(TypeError, match="expected"):
        TarFiles(root / "*.tar", fields)


@pytest.mark.parametrize("extensions", ["", "jpg;", "jpg;__key__"])
def test_extensions_that_are_none_are_refused(root, extensions):
    with pytest.raises(ValueError, match="is no list of extensions"):
        TarFiles(root / "*.tar", {"image": extensions})


def test_equal_keys_in_different_shards_are_different_samples(tmp_path):
    for shard in range(2):
        write_tar(tmp_path / f"{shard}.tar", [("0.cls", str(shard).encode())])
    assert [sample["label"] for sample in TarFiles(tmp_path / "*.tar")] == [0, 1]


@pytest.mark.parametrize(
    ("extension", "content", "told"),
    [
        ("cls", b"cat", "invalid literal for int"),
        ("json", b"{", "Expecting property name"),
        ("json", b"[" * 100_000, "recursion"),
        ("txt", b"\xff\xfe", "codec can't decode"),
        ("npy", b"no array", "no array that NumPy can read"),
        ("npy", npy(np.array([object()]), allow_pickle=True), "no array that NumPy can read"),
        ("jpg", b"no photo", "OpenCV cannot decode"),
        ("jpg", b"", "the file is empty"),
    ],
)
def test_a_member_that_cannot_be_decoded_is_named(tmp_path, extension, content, told):
    path = write_tar(tmp_path / "0.tar", [(f"a/0.{extension}", content)])
    with pytest.raises(DecodeError, match=rf'^sample 0 \("{path}/a/0.{extension}"\).*{told}') as caught:
        TarFiles(path)[0]
    assert (caught.value.index, caught.value.source) == (0, f"{path}/a/0.{extension}")


@pytest.mark.skipif(not hasattr(BaseException, "add_note"), reason="tracebacks have notes from Python 3.11 on")
def test_an_error_of_a_decoder_of_ones_own_is_raised_with_the_sample(root):
    with pytest.raises(ZeroDivisionError) as caught:
        TarFiles(root / "*.tar", {"label": ("cls", lambda content: 1 / 0)})[3]
    assert f'field "label" of sample 3 ("{root}/000.tar/03.cls")' in caught.value.__notes__[0]


# -- crops and rows


def loaded(dataset, **options):
    batches = list(DataLoader(dataset, 4, seed=5, **options))
    return {name: torch.cat([batch[name] for batch in batches]).numpy() for name in ("image", "label")}


@pytest.mark.parametrize("restart", [0, 2])
@pytest.mark.parametrize("workers", [{}, {"num_workers": 2}, {"num_workers": 2, "worker_method": "thread"}])
@pytest.mark.parametrize("normalize", [None, (MEAN, STD)])
def test_every_engine_gives_the_bits_of_the_same_photos_in_files(tmp_path, restart, workers, normalize):
    files = write_photos(tmp_path, restart=restart)
    crop = RandomResizedCrop((24, 30), flip=0.5)
    folder = ImageFiles(files, [3 * number for number in range(12)], crop=crop, normalize=normalize)
    tars = TarFiles(tmp_path / "*.tar", crop=crop, normalize=normalize)
    expected, found = loaded(folder), loaded(tars, **workers)
    np.testing.assert_array_equal(found["image"], expected["image"])
    assert found["label"].tolist() == expected["label"].tolist() == [3 * number for number in range(12)]


def test_loaders_have_the_pixels_written_into_the_row(root, monkeypatch):
    for options in ({"crop": CenterCrop(24)}, {"normalize": (MEAN, STD), "crop": CenterCrop(24)}):
        asked, get = [], TarFiles.__getitem__
        with monkeypatch.context() as patch:
            patch.setattr(TarFiles, "__getitem__", lambda self, index: asked.append(index) or get(self, index))  # noqa: B023
            loaded(TarFiles(root / "*.tar", **options))
        assert set(asked) <= {0}  # the first sample shows what the batch will be
    assert not hasattr(TarFiles(root / "*.tar"), "read_into")
    assert not hasattr(TarFiles(root / "*.tar", crop=CenterCrop(24), transform=double_label), "read_into")


@pytest.mark.parametrize("method", ["__getitem__", "_read"])
def test_what_a_subclass_adds_to_a_sample_is_in_the_batch(root, method):
    def read(self, index):
        return {**getattr(TarFiles, method)(self, index), "square": index * index}

    dataset = type("Squares", (TarFiles,), {method: read})(root / "*.tar", crop=CenterCrop(24))
    found = [value for batch in DataLoader(dataset, 4) for value in batch["square"].tolist()]
    assert found == [index * index for index in range(12)]


def test_patches_make_several_samples_of_a_member(root):
    dataset = TarFiles(root / "*.tar", {"label": "cls", "image": "jpg"}, crop=RandomPatches(16, per_photo=3))
    assert (len(dataset), dataset.group_sizes.tolist()) == (36, [15, 15, 6])
    assert [dataset[index]["label"] for index in (0, 2, 3, -1)] == [0, 0, 3, 33]
    assert dataset[20]["image"].shape == (16, 16, 3)
    assert "3 of each image" in repr(dataset)


@pytest.mark.parametrize("normalize", [None, (MEAN, STD)])
def test_several_crops_of_several_sizes_are_those_of_the_same_files(tmp_path, normalize):
    files, crop = write_photos(tmp_path, restart=2), MultiCrop([(24, 2), (12, 3)])
    folder = ImageFiles(files, np.arange(12), crop=crop, normalize=normalize)
    tars = TarFiles(tmp_path / "*.tar", crop=crop, normalize=normalize)
    for mine, other in zip(*(DataLoader(each, 4, seed=5) for each in (tars, folder)), strict=True):
        assert mine["label"].tolist() == [3 * number for number in other["label"].tolist()]
        assert [stack.shape[1] for stack in mine["image"]] == [2, 3]
        assert all(torch.equal(a, b) for a, b in zip(mine["image"], other["image"], strict=True))


def test_a_crop_of_the_image_alone_is_refused_beside_other_images(tmp_path):
    path = write_tar(tmp_path / "0.tar", [("0.jpg", zoo()["jpeg 420"]), ("0.seg.png", zoo()["png grey"])])
    with pytest.raises(ValueError, match=r"would cut the field \"image\" and not 'seg.png': .* in the transform"):
        TarFiles(path, crop=CenterCrop(24))
    assert TarFiles(path, {"image": "jpg", "mean": ("seg.png", brightness)}, crop=CenterCrop(24))[0]["mean"] > 0
    for options in ({"crop": CenterCrop(24)}, {"normalize": (MEAN, STD)}):
        for fields in ({"photo": "jpg"}, {"image": ("jpg", brightness)}):
            with pytest.raises(ValueError, match='are for the field "image", decoded by this package'):
                TarFiles(path, fields, **options)


def test_a_field_called_image_may_hold_something_else(tmp_path):
    entries = [("0.jpg", zoo()["jpeg 420"]), ("1.npy", npy(np.arange(3))), ("1.json", b"[1]"), ("0.json", b"[0]")]
    path = write_tar(tmp_path / "0.tar", entries)
    either = TarFiles(path, {"image": "jpg;npy"})
    assert either[0]["image"].shape == read_image(zoo()["jpeg 420"]).shape
    assert either[1]["image"].tolist() == [0, 1, 2]
    assert TarFiles(path, {"image": "json"})[1]["image"] == [1]
    assert TarFiles(path, {"image": "__key__"})[1]["image"] == "1"
    for options in ({"crop": CenterCrop(24)}, {"normalize": (MEAN, STD)}):
        with pytest.raises(ValueError, match="with extensions of images alone"):
            TarFiles(path, {"image": "jpg;npy"}, **options)


def test_an_error_of_an_image_has_one_remedy(tmp_path):
    path = write_tar(tmp_path / "0.tar", [("0.jpg", b"no photo")])
    dataset = TarFiles(path)
    with pytest.raises(DecodeError, match=r"\n  Write the shard again, or leave the sample out.$"):
        dataset[0]
    moved = TarFiles(path)
    os.utime(path, ns=(0, 5))
    with pytest.raises(DecodeError, match=r"another modification time.\n  Make the dataset again.*one.$") as caught:
        moved[0]
    assert str(caught.value).count("\n") == 1


def test_an_image_decoded_by_a_function_of_ones_own_is_what_that_returns(root):
    assert TarFiles(root / "*.tar", {"image": ("jpg", len), "label": "cls"})[1] == {
        "image": (root / "files" / "01.jpg").stat().st_size,
        "label": 3,
    }


# -- how much is read


@pytest.fixture
def reads(monkeypatch):
    """Bytes of each read of a shard."""
    noted, pread = [], os.pread

    def counted(fd, nbytes, at):
        noted.append(nbytes)
        return pread(fd, nbytes, at)

    monkeypatch.setattr(os, "pread", counted)
    return noted


def test_a_window_of_a_member_with_restart_markers_costs_the_window(tmp_path, reads):
    content = jpeg(photo(1600, 1200), restart=2)
    path = write_tar(tmp_path / "0.tar", [("0.cls", b"0"), ("0.jpg", content)])
    dataset = TarFiles(path, {"image": "jpg"}, crop=RandomPatches(64))
    dataset[0]  # finds the markers
    reads.clear()
    enter_sample(0, 0, 0)
    window = dataset[0]["image"]
    assert 0 < sum(reads) < 0.2 * len(content)
    enter_sample(0, 0, 0)
    np.testing.assert_array_equal(window, RandomPatches(64).read(content))
    leave_sample()


def test_an_index_of_markers_beside_the_shard_serves_from_the_first_read(tmp_path, reads):
    from loaders.images.decode.header import read_header
    from loaders.images.decode.restart import find_restarts

    content = jpeg(photo(1600, 1200), restart=2)
    path = write_tar(tmp_path / "0.tar", [("a/0.jpg", content)])
    status, index = path.stat(), index_of(tmp_path)
    restarts = find_restarts(content, read_header(content).jpeg)
    index.add(b"0.tar/a/0.jpg", len(content), status.st_mtime_ns, restarts)
    assert index.save()
    dataset = TarFiles(path, crop=RandomPatches(64))
    reads.clear()
    dataset[0]
    assert 0 < sum(reads) < 0.2 * len(content)


def test_a_field_that_is_not_asked_for_is_not_read(root, reads):
    dataset = TarFiles(root / "*.tar", {"label": "cls"})
    reads.clear()
    assert dataset[4] == {"label": 12}
    assert reads == [
        1024 + 2
    ]  # its header and the block before, which shows that the shard is the same, and the member


# -- processes, threads, descriptors
