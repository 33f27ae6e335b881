"""docs/conversions.md is what the code generates, and each of its cells is what the code does."""

import re
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from loaders.bridge import as_array, as_tensor, dtypes, table
from loaders.errors import DtypeError

DOCUMENT = Path(__file__).parents[3] / "docs" / "conversions.md"
COPY_MODES = (False, None, True)
ARRAYS_WITHOUT_COUNTERPART = {
    "longdouble": np.zeros(3, np.longdouble),
    "clongdouble": np.zeros(3, np.clongdouble),
    "datetime64": np.zeros(3, "M8[s]"),
    "timedelta64": np.zeros(3, "m8[s]"),
    "object": np.array([1, None, "x"], object),
    "str": np.array(["a", "bc"]),
    "bytes": np.array([b"a", b"bc"]),
    "void, structured": np.zeros(3, "i4, f8"),
}
if hasattr(np.dtypes, "StringDType"):  # NumPy 2
    ARRAYS_WITHOUT_COUNTERPART["StringDType"] = np.array(["a", "bc"], np.dtypes.StringDType())
TORCH_DTYPES = {
    str(value).removeprefix("torch."): value for value in vars(torch).values() if isinstance(value, torch.dtype)
}


def documented(heading):
    """The rows of one table of the document: first cell without backticks → the other cells."""
    section = DOCUMENT.read_text().split(f"## {heading}\n")[1].split("\n##")[0]
    rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in section.splitlines() if "|" in line]
    return {row[0].replace("`", "").strip(): row[1:] for row in rows[2:]}


def tensor_of(name):
    """Sixteen bytes of zeros; quantized and complex32 tensors warn when they are made."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if name.startswith(("qint", "quint")):
            return torch.empty(4, dtype=TORCH_DTYPES[name])
        return torch.zeros(16, dtype=torch.uint8).view(TORCH_DTYPES[name])


def test_committed_document_is_what_the_code_generates():
    assert DOCUMENT.read_text() == table.render(), "run: python -m loaders.bridge.table > docs/conversions.md"


@pytest.mark.parametrize(("name", "cells"), documented("Dtypes: `as_tensor`").items())
@pytest.mark.parametrize("copy", COPY_MODES)
def test_as_tensor_does_what_its_dtype_cell_says(name, cells, copy):
    if name in ARRAYS_WITHOUT_COUNTERPART:
        array = ARRAYS_WITHOUT_COUNTERPART[name]
    elif name == "StringDType":
        pytest.skip("NumPy 1 has no StringDType")
    else:
        array = np.array([[0, 1], [1, 0]], name)
        tensor = as_tensor(array, copy=copy)
        assert f"`{tensor.dtype}`" == cells[0]
        assert tensor.tolist() == array.tolist()
    assert table.outcome(as_tensor, array, copy) == cells[1 + COPY_MODES.index(copy)]


@pytest.mark.parametrize(("name", "cells"), documented("Dtypes: `as_array`").items())
@pytest.mark.parametrize("copy", COPY_MODES)
def test_as_array_does_what_its_dtype_cell_says(name, cells, copy):
    if name not in TORCH_DTYPES:
        pytest.skip(f"this torch has no {name}")
    tensor = tensor_of(name)
    expected = cells[1 + COPY_MODES.index(copy)]
    assert table.outcome(as_array, tensor, copy) == expected
    if "Error" not in expected:
        assert as_array(tensor, copy=copy).dtype == np.dtype(cells[0].strip("`").removeprefix("np."))


def test_every_dtype_of_this_torch_is_in_the_table():
    assert set(TORCH_DTYPES) <= {*dtypes.SHARED, *dtypes.WIDENED, *dtypes.TORCH_ONLY}


@pytest.mark.parametrize("code", np.typecodes["All"])
def test_every_numpy_type_code_is_shared_or_refused_with_a_remedy(code):
    array = np.zeros(2, code)
    if array.dtype.kind in "biufc" and f"{array.dtype.kind}{array.itemsize}" in dtypes._NATIVE:
        assert table.outcome(as_tensor, array, False) == "shares"  # also ulonglong, which torch.from_numpy refuses
    else:
        with pytest.raises(DtypeError, match=r"torch has no such dtype\.\n  \w"):
            as_tensor(array)


def test_a_dtype_registered_by_another_package_is_refused_whatever_its_kind():
    module = (
        "numpy._core._rational_tests"
        if np.lib.NumpyVersion(np.__version__) >= "2.0.0"
        else "numpy.core._rational_tests"
    )
    rational = pytest.importorskip(module).rational
    with pytest.raises(DtypeError, match=r"astype with one of NumPy's own"):
        as_tensor(np.array([rational(1, 2)]))


class ForeignFloat:
    """A dtype of another package that looks like float32: the bytes mean something else."""

    kind, itemsize, isbuiltin = "f", 4, 2

    def newbyteorder(self, order):
        return self


def test_kind_and_size_alone_make_no_counterpart():
    with pytest.raises(DtypeError):
        dtypes.native_dtype(SimpleNamespace(dtype=ForeignFloat(), shape=(3,)))


def test_bfloat16_widens_exactly_for_every_bit_pattern():
    patterns = np.arange(2**16, dtype=np.uint16)
    widened = as_array(as_tensor(patterns).view(torch.bfloat16))
    expected = (patterns.astype(np.uint32) << 16).view(np.float32)
    np.testing.assert_array_equal(widened, expected)


@pytest.mark.parametrize(
    "name", [name for name in dtypes.WIDENED if name.startswith("float8") and name in TORCH_DTYPES]
)
def test_float8_widens_exactly_for_every_bit_pattern(name):
    patterns = torch.arange(256, dtype=torch.uint8)
    widened = as_array(patterns.view(TORCH_DTYPES[name]))
    again = torch.from_numpy(widened.copy()).to(TORCH_DTYPES[name]).view(torch.uint8)
    np.testing.assert_array_equal(again.numpy()[~np.isnan(widened)], patterns.numpy()[~np.isnan(widened)])
    assert widened.dtype == np.float32
    assert np.isnan(widened).sum() < 7


def test_complex32_widens_exactly():
    halves = np.array([[1.5, -2.0], [0.0009765625, 65504.0]], np.float16)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # complex32 warns when it is made
        tensor = as_tensor(halves).view(torch.complex32)
    np.testing.assert_array_equal(as_array(tensor)[:, 0], np.array([1.5 - 2j, 0.0009765625 + 65504j], np.complex64))


@pytest.mark.parametrize("name", [name for name in dtypes.TORCH_ONLY if "q" not in name and name in TORCH_DTYPES])
def test_sub_byte_tensors_are_refused_with_a_remedy_that_works(name):
    tensor = tensor_of(name)
    with pytest.raises(DtypeError, match=re.escape("Call tensor.view(torch.uint8) for the raw bytes")):
        as_array(tensor)
    assert as_array(tensor.view(torch.uint8)).nbytes == 16


def test_quantized_tensors_are_refused_with_a_remedy_that_works():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated by torch, but still met
        tensor = torch.quantize_per_tensor(torch.tensor([0.0, 0.5]), 0.5, 0, torch.quint8)
    with pytest.raises(DtypeError, match=r"dequantize\(\) for the values, or tensor\.int_repr\(\)"):
        as_array(tensor)
    assert as_array(tensor.dequantize()).tolist() == [0.0, 0.5]
    assert as_array(tensor.int_repr()).tolist() == [0, 1]
