import os
import sys
import warnings

import cv2
import numpy as np
import pytest

from loaders import DatasetError, DecodeError, ImageFiles, ImageFolder, RandomPatches, Resize
from loaders.datasets.image_files import PackedPaths
from loaders.doctor.samples import check_reading, read_samples


def photo(path, value=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    done, encoded = cv2.imencode(".png", np.full((4, 5, 3), value, np.uint8))
    assert done
    path.write_bytes(encoded.tobytes())
    return path


def names(dataset, root):
    return [os.path.relpath(path, root) for path in dataset.paths]


def test_a_class_is_a_folder_and_a_sample_is_an_rgb_image_with_its_label(tmp_path):
    photo(tmp_path / "dog" / "1.png", 7)
    photo(tmp_path / "cat" / "2.png", 8)
    dataset = ImageFolder(tmp_path)
    assert dataset.classes == ["cat", "dog"]
    assert dataset.class_to_idx == {"cat": 0, "dog": 1}
    sample = dataset[1]
    assert list(sample) == ["image", "label"]
    assert sample["image"].shape == (4, 5, 3)
    assert (sample["image"] == 7).all()
    assert type(sample["label"]) is int
    assert sample["label"] == 1
    assert repr(dataset) == f'ImageFolder("{tmp_path}", 2 images, 2 classes: cat, dog)'
    assert dataset.describe(1) == str(tmp_path / "dog" / "1.png")


def test_folders_inside_a_class_belong_to_it_in_the_order_of_their_paths(tmp_path):
    for name in ("a/z.png", "a/b/2.png", "a/b/1.png", "a/b-c/3.png", "a/B.PNG", "a/x.jpg/4.png"):
        photo(tmp_path / name)
    # The order of torchvision: folders by their whole path ("a/b-c" < "a/b/…" but > "a/b"), files by name within.
    expected = ["a/B.PNG", "a/z.png", "a/b/1.png", "a/b/2.png", "a/b-c/3.png", "a/x.jpg/4.png"]
    assert names(ImageFolder(tmp_path), tmp_path) == expected


def test_hidden_files_folders_and_other_files_are_no_images(tmp_path):
    for name in ("a/1.png", "a/._1.png", "a/.thumbs/2.png", ".git/3.png", "loose.png"):
        photo(tmp_path / name)
    (tmp_path / "a" / "notes.txt").write_text("")
    assert names(ImageFolder(tmp_path), tmp_path) == ["a/1.png"]


def test_extensions_can_be_narrowed_and_one_may_be_a_plain_str(tmp_path):
    photo(tmp_path / "a" / "1.png")
    photo(tmp_path / "a" / "2.webp")
    dataset = ImageFolder(tmp_path, extensions=".WEBP")
    assert names(dataset, tmp_path) == ["a/2.webp"]
    assert dataset.extensions == (".WEBP",)


def test_links_are_followed_and_links_that_go_round_end(tmp_path):
    photo(tmp_path / "elsewhere" / "1.png")
    root = tmp_path / "root"
    (root / "a").mkdir(parents=True)
    (root / "a" / "link").symlink_to(tmp_path / "elsewhere")
    (root / "a" / "one.png").symlink_to(tmp_path / "elsewhere" / "1.png")
    (root / "a" / "self").symlink_to(root / "a")
    (tmp_path / "elsewhere" / "back").symlink_to(root / "a")
    (root / "b").symlink_to(tmp_path / "elsewhere")
    dataset = ImageFolder(root)
    found = names(dataset, root)
    assert {"a/one.png", "a/link/1.png", "b/1.png"} <= set(found)
    assert len(found) < 10
    assert all(sample["image"].shape == (4, 5, 3) for sample in dataset)


def test_a_broken_link_is_an_image_that_cannot_be_read_not_one_that_vanishes(tmp_path):
    photo(tmp_path / "a" / "1.png")
    (tmp_path / "a" / "2.png").symlink_to("nowhere.png")
    dataset = ImageFolder(tmp_path)
    with pytest.raises(DecodeError, match=rf'^sample 1 \("{tmp_path}/a/2.png"\): No such file') as caught:
        dataset[-1]
    assert (caught.value.index, caught.value.source) == (1, str(tmp_path / "a" / "2.png"))


def test_links_that_lead_to_themselves_are_images_that_cannot_be_read_or_nothing(tmp_path):
    photo(tmp_path / "a" / "1.png")
    for name in ("class", "a/folder", "a/loop.png"):
        (tmp_path / name).symlink_to(os.path.basename(name))
    dataset = ImageFolder(tmp_path)
    assert dataset.classes == ["a"]
    assert names(dataset, tmp_path) == ["a/1.png", "a/loop.png"]
    with pytest.raises(DecodeError, match=r"loop\.png.*: Too many levels of symbolic links"):
        dataset[1]


def test_folders_that_link_to_each_other_are_listed_once_in_each_class(tmp_path):
    photo(tmp_path / "c0" / "1.png")
    for number in range(9):
        (tmp_path / f"c{number}").mkdir(exist_ok=True)
        for other in range(9):
            (tmp_path / f"c{number}" / f"to {other}").symlink_to(f"../c{other}")
    dataset = ImageFolder(tmp_path)
    assert dataset.labels.tolist() == list(range(9))
    assert names(dataset, tmp_path) == ["c0/1.png"] + [f"c{number}/to 0/1.png" for number in range(1, 9)]


def test_a_folder_counts_where_it_is_and_not_where_links_lead_to_it(tmp_path):
    photo(tmp_path / "a" / "real" / "deep" / "1.png")
    (tmp_path / "a" / "earlier").symlink_to("real")
    (tmp_path / "a" / "0").symlink_to("real/deep")
    assert names(ImageFolder(tmp_path), tmp_path) == ["a/real/deep/1.png"]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
@pytest.mark.parametrize("crop", [None, Resize((4, 4)), RandomPatches(2)])
def test_a_pipe_or_a_device_among_images_is_an_error_at_once(crop, tmp_path):
    os.mkfifo(photo(tmp_path / "a" / "3.png").with_name("0.jpg"))
    (tmp_path / "a" / "1.jpg").symlink_to("0.jpg")
    (tmp_path / "a" / "2.jpg").symlink_to("/dev/zero")
    dataset = ImageFolder(tmp_path, crop=crop)
    for index in range(3):
        with pytest.raises(DecodeError, match=rf"sample {index} .*{index}\.jpg.*: it is a pipe or a device") as caught:
            dataset[index]
        assert caught.value.index == index
    assert dataset[3]["image"].ndim == 3


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_the_doctor_names_a_pipe_among_images(tmp_path):
    os.mkfifo(photo(tmp_path / "a" / "1.png").with_name("0.jpg"))
    found = check_reading(read_samples(ImageFolder(tmp_path), range(2)))
    assert found.severity == "problem"
    assert "0.jpg" in found.what
    assert "it is a pipe or a device" in found.what


@pytest.mark.parametrize("name", ["", "a", "a/inner"])
def test_a_folder_that_cannot_be_listed_is_named_and_its_images_do_not_vanish(name, tmp_path, monkeypatch):
    photo(tmp_path / "a" / "inner" / "1.png")
    photo(tmp_path / "b" / "1.png")
    scandir = os.scandir

    def refused(path):
        if os.fsdecode(path) == os.path.join(tmp_path, name).rstrip("/"):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refused)
    with pytest.raises(DatasetError, match=rf'{os.path.basename(name)}" cannot be listed: Permission denied'):
        ImageFolder(tmp_path)


@pytest.mark.skipif(sys.platform != "linux", reason="other systems refuse names that are no text")
def test_names_in_any_script_or_none_work(tmp_path):
    photo(tmp_path / "猫" / "größe 🐈.png", 1)
    raw = os.fsencode(tmp_path) + b"/\xff\xfe"
    os.mkdir(raw)
    os.rename(photo(tmp_path / "猫" / "tmp.png", 2), raw + b"/\xe9.png")
    dataset = ImageFolder(tmp_path)
    assert sorted(int(sample["image"][0, 0, 0]) for sample in dataset) == [1, 2]
    assert dataset.classes == ["猫", os.fsdecode(b"\xff\xfe")]
    print(dataset, [dataset.describe(index) for index in range(2)])
    assert dataset.describe(1).endswith("\\xff\\xfe/\\xe9.png")


def test_classes_without_images_keep_their_label_and_are_named(tmp_path):
    photo(tmp_path / "b" / "1.png")
    (tmp_path / "a").mkdir()
    (tmp_path / "c").mkdir()
    with pytest.warns(UserWarning, match=r"2 of 3 classes have no image ending in .*: a, c"):
        dataset = ImageFolder(tmp_path)
    assert dataset.classes == ["a", "b", "c"]
    assert dataset[0]["label"] == 1


@pytest.mark.parametrize("layout", [(), ("1.png",), ("a/notes.txt",)])
def test_a_folder_without_images_is_refused_with_the_layout_that_is_wanted(layout, tmp_path):
    for name in layout:
        photo(tmp_path / name)
    with pytest.raises(DatasetError, match=rf'No images in "{tmp_path}".*\n.*root/cat/1.jpg.*ImageFiles'):
        ImageFolder(tmp_path)


def test_a_root_that_is_no_folder_is_named(tmp_path):
    with pytest.raises(DatasetError, match=r'nowhere" is not a folder'):
        ImageFolder(tmp_path / "nowhere")


def test_constructor_arguments_are_kept(tmp_path):
    path = photo(tmp_path / "a" / "1.png")
    folder = ImageFolder(tmp_path, len, extensions=(".png",))
    assert (folder.root, folder.transform, folder.extensions) == (tmp_path, len, (".png",))
    files = ImageFiles([path], [5], len)
    assert (list(files.paths), files.labels.tolist(), files.transform) == ([str(path)], [5], len)
    again = ImageFiles(files.paths, files.labels, None)
    assert again[0]["label"] == 5


@pytest.mark.parametrize(
    ("labels", "first"),
    [
        ([4, 5], 4),
        (np.array([4, 5], np.uint8), 4),
        (["cat", "dog"], "cat"),
        (np.array([0.5, 1], np.float32), np.float32(0.5)),
        ([True, False], np.True_),
        ({0: 4, 1: 5}.values(), 4),
    ],
)
def test_scalar_labels_keep_their_value_and_type(labels, first, tmp_path):
    paths = [photo(tmp_path / "1.png"), photo(tmp_path / "2.png")]
    label = ImageFiles(paths, list(labels) if not isinstance(labels, np.ndarray) else labels)[0]["label"]
    assert type(label) is type(first)
    assert label == first


def test_labels_may_be_rows_or_things_of_any_shape(tmp_path):
    paths = [photo(tmp_path / "1.png"), photo(tmp_path / "2.png")]
    assert ImageFiles(paths, np.eye(2, dtype=np.float32))[1]["label"].tolist() == [0, 1]
    ragged = [np.zeros((1, 4)), np.ones((3, 4))]
    assert ImageFiles(paths, ragged)[1]["label"] is ragged[1]
    same_rows = [np.zeros((2, 4)), np.ones((2, 3))]
    assert ImageFiles(paths, same_rows)[1]["label"].shape == (2, 3)
    assert list(ImageFiles(paths)[0]) == ["image"]


def test_paths_and_labels_of_different_length_are_refused(tmp_path):
    with pytest.raises(DatasetError, match="2 paths but 3 labels"):
        ImageFiles(["a", "b"], [1, 2, 3])


def test_one_path_in_place_of_a_list_is_refused(tmp_path):
    for path in ("photos", b"photos", tmp_path):
        with pytest.raises(TypeError, match="did you mean ImageFolder"):
            ImageFiles(path)


def test_a_dataset_of_no_files_is_empty():
    assert list(ImageFiles([])) == []


def test_a_hundred_thousand_paths_cost_two_arrays_and_no_objects():
    paths = PackedPaths(f"train/{number % 1000:03d}/{number}.jpg" for number in range(100_000))
    assert paths[99_999] == paths[-1] == "train/999/99999.jpg"
    assert paths[0] == "train/000/0.jpg"
    assert paths.nbytes < 100_000 * 32
    held = [value for value in vars(paths).values() if not isinstance(value, np.ndarray)]
    assert held == []


def test_scanning_reads_no_file(tmp_path):
    for number in range(50):
        (tmp_path / "a").mkdir(exist_ok=True)
        (tmp_path / "a" / f"{number}.jpg").write_bytes(b"")  # nothing to read: only the names count
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(ImageFolder(tmp_path)) == 50
