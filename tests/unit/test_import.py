import importlib
import inspect
import re
import subprocess
import sys

import pytest

import loaders
from loaders import LoadersError, errors

HEAVY = ("torch", "albumentations", "cv2", "matplotlib", "typer", "rich")


@pytest.mark.parametrize(
    "names",
    [
        "",
        "sample_rng, worker_info, Field, SkippedSample, LoadersError, WorkerLostError",
        "Dataset, ArrayDataset, ImageFolder, ImageFiles",
        "Albumentations",
        "read_image",
    ],
)
def test_importing_loaders_imports_nothing_heavy(names):
    program = f"import sys, loaders\n{f'from loaders import {names}' if names else ''}\nprint(*sys.modules)"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    heavy = [name for name in HEAVY if name in run.stdout.split()]
    # OpenCV comes with what decodes images, and with nothing else.
    assert heavy == (["cv2"] if "mage" in names else [])


@pytest.mark.parametrize("name", loaders.__all__)
def test_every_public_name_is_importable_from_loaders(name):
    value = getattr(loaders, name)
    assert value is not None
    if hasattr(value, "__module__") and name != "__version__":
        assert value.__module__.startswith("loaders.")
        assert inspect.getdoc(value), f"{name} has no docstring"


def test_the_list_of_public_names_is_complete_and_without_doubles():
    assert len(set(loaders.__all__)) == len(loaders.__all__)
    assert set(loaders.__all__) == {"__version__", "errors", *loaders._HOME}
    assert set(loaders.__all__) <= set(dir(loaders))
    for name, module in loaders._HOME.items():
        assert getattr(importlib.import_module(module), name) is getattr(loaders, name)


def test_type_checkers_and_the_interpreter_know_the_same_names():
    source = inspect.getsource(loaders)
    declared = dict(re.findall(r"^    from (\S+) import \w+ as (\w+)$", source, re.MULTILINE))
    pairs = re.findall(r"^    from (\S+) import (\w+) as (\w+)$", source, re.MULTILINE)
    assert declared
    assert {name: module for module, name, _ in pairs} == loaders._HOME
    assert all(name == alias for _, name, alias in pairs)


def test_a_name_that_does_not_exist_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'DataLoeder'"):
        loaders.DataLoeder  # noqa: B018  the access is the test
    with pytest.raises(ImportError, match="DataLoeder"):
        from loaders import DataLoeder  # noqa: F401  the import is the test


# -- the exceptions


def classes_of(base):
    return [base] + [
        below for each in base.__subclasses__() if each.__module__ == "loaders.errors" for below in classes_of(each)
    ]


def tree_in_the_docstring():
    """(depth, name, other bases) of every line of the tree in the docstring of `errors`."""
    for line in errors.__doc__.splitlines():
        match = re.match(r"( {4}[│├└─ ]*)(\w+)(?: \(([\w, ]+)\))?(?: {2,}|$)", line)
        if match and match[2].endswith("Error"):
            yield (len(match[1]) - 4) // 4, match[2], (match[3] or "").split(", ") if match[3] else []


def test_the_docstring_draws_the_whole_tree_of_exceptions():
    drawn, path = {}, []
    for depth, name, others in tree_in_the_docstring():
        path[depth:] = [name]
        drawn[name] = {path[depth - 1] if depth else "Exception", *others}
    assert drawn == {each.__name__: {base.__name__ for base in each.__bases__} for each in classes_of(LoadersError)}


CAUGHT = ("Conversion", "Dataset", "Decode", "Loaders", "Sample", "State", "WorkerLost", "WorkerTimeout")


def test_the_exceptions_that_people_catch_are_at_the_top_and_all_are_in_errors():
    assert {name for name in loaders.__all__ if name.endswith("Error")} == {f"{name}Error" for name in CAUGHT}


def test_every_exception_is_documented_and_also_a_built_in_one():
    for each in classes_of(LoadersError):
        assert getattr(errors, each.__name__) is each
        assert inspect.getdoc(each)
        if not each.__subclasses__():
            built_in = [base for base in each.__mro__ if base.__module__ == "builtins"]
            assert len(built_in) > 3, f"{each.__name__} is nothing but an Exception"  # object, BaseException, Exception
