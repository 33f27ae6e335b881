"""What `loaders bench` and `loaders doctor` take for a target."""

import sys

import pytest

from loaders import DatasetError, ImageFiles, ImageFolder
from loaders.benchmark.target import dataset_of, load_target

CODE = """
import torch
from loaders import DataLoader

numbers = list(range(8))

def dataset():
    return numbers

def loader():
    return DataLoader(numbers, batch_size=2)

class Numbers(list):
    def __init__(self):
        super().__init__(range(4))

def nothing():
    return 7
"""


@pytest.fixture
def code(tmp_path, monkeypatch):
    """A file with factories, in the working folder."""
    (tmp_path / "factories_of_this_test.py").write_text(CODE)
    (tmp_path / "broken_of_this_test.py").write_text("import missing_module_of_this_test")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield tmp_path
    sys.modules.pop("factories_of_this_test", None)


@pytest.mark.parametrize("place", ["factories_of_this_test", "factories_of_this_test.py"])
@pytest.mark.parametrize(("name", "length"), [("dataset", 8), ("numbers", 8), ("Numbers", 4), ("loader", 4)])
def test_a_module_or_a_file_gives_a_dataset_or_a_loader(code, place, name, length):
    made = load_target(f"{place}:{name}")
    assert len(made) == length
    assert len(dataset_of(made)) == (8 if name == "loader" else length)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nowhere", '"nowhere" is no folder'),
        ("nowhere_of_this_test:factory", 'no module "nowhere_of_this_test"'),
        ("factories_of_this_test:missing", "has no attribute 'missing'"),
        ("factories_of_this_test:nothing", "gave a int, which can be neither iterated nor indexed"),
        (":factory", "is no folder"),
    ],
)
def test_what_is_no_target_is_named_with_what_would_be_one(code, text, message):
    with pytest.raises(DatasetError, match=message) as caught:
        load_target(text)
    assert "module:factory" in str(caught.value)


def test_what_a_module_itself_cannot_import_is_its_own_error(code):
    with pytest.raises(ModuleNotFoundError, match="missing_module_of_this_test"):
        load_target("broken_of_this_test:factory")


def test_a_folder_of_classes_and_a_folder_of_files(few_photos):
    classes = load_target(str(few_photos / "train"), crop=32)
    assert isinstance(classes, ImageFolder)
    assert classes[0]["image"].shape == (32, 32, 3)
    files = load_target(str(few_photos / "train" / "coffee"))
    assert isinstance(files, ImageFiles)
    assert files[0]["image"].shape == (160, 160, 3)
