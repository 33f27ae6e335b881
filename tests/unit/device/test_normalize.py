"""Pixels on the device: exact values, the layout that costs nothing, one pass, and which tensors of a batch."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from collections import namedtuple

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from loaders import DataLoader, DevicePrefetcher, Field, Normalize, Ragged
from loaders.device import normalize as normalize_module
from loaders.errors import ArrayKindError, DtypeError, FieldNameError, ImageShapeError
from loaders.nested import leaves

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
EPSILON = 2.0**-24  # of a rounding to float32, relative


@pytest.fixture(params=["converts first", "casts in the kernel"])
def way(request, monkeypatch):
    """Both ways to compute, on the CPU: the second one is that of CUDA."""
    monkeypatch.setattr(normalize_module, "_CASTS_IN_KERNELS", ("cpu",) if "kernel" in request.param else ())


@pytest.fixture
def photos():
    return torch.from_numpy(np.random.default_rng(0).integers(0, 256, (2, 5, 7, 3), np.uint8))


def every_pixel(channels):
    """uint8 (1, 16, 16, C): each of the 256 values in every channel."""
    return torch.arange(256, dtype=torch.uint8).reshape(1, 16, 16, 1).repeat(1, 1, 1, channels)


def exact(pixels, mean, std):
    """float64 (B, C, H, W)."""
    values = (pixels.numpy() / 255 - np.array(mean)) / np.array(std)
    return torch.from_numpy(np.moveaxis(values, -1, -3).copy())


# -- values


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_pixel_value_comes_out_as_the_exact_one_rounded_once(dtype, channels_last):
    pixels = every_pixel(3)
    got = Normalize(MEAN, STD, dtype, channels_last)(pixels)
    wanted = exact(pixels, MEAN, STD)
    assert got.dtype == dtype
    if dtype != torch.float32:
        assert torch.equal(got, wanted.to(dtype))
    # Of float32 arithmetic: scale, bias and their product rounded, and the sum, each of at most 3 in size.
    assert (got.double() - wanted.to(dtype).double()).abs().max() <= 4 * EPSILON * 3


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("dtype", DTYPES)
def test_any_mean_and_std_round_once_from_float32(dtype, seed):
    rng = np.random.default_rng(seed)
    channels = (1, 3, 4)[seed % 3]
    mean, std = rng.uniform(0, 1, channels), rng.uniform(0.05, 2, channels)
    pixels = every_pixel(channels)
    got = Normalize(mean, std, dtype)(pixels)
    wanted = exact(pixels, mean, std)
    slack = 4 * EPSILON * max(1 / std.min(), 1)
    low, high = (wanted - slack).to(dtype), (wanted + slack).to(dtype)
    assert ((low <= got) & (got <= high)).all()


def test_both_ways_to_compute_agree_to_the_bit(photos, monkeypatch):
    converted = Normalize(MEAN, STD, torch.float32)(photos)
    monkeypatch.setattr(normalize_module, "_CASTS_IN_KERNELS", ("cpu",))
    assert torch.equal(Normalize(MEAN, STD, torch.float32)(photos), converted)


@pytest.mark.parametrize("kind", [list, tuple, np.array, torch.tensor])
def test_mean_and_std_in_any_form(photos, kind):
    assert torch.equal(Normalize(kind(MEAN), kind(STD))(photos), exact(photos, MEAN, STD).to(torch.bfloat16))


# -- layout and memory


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("size", [(2, 5, 7), (1, 5, 7), (0, 5, 7), (2, 1, 1)])
def test_the_memory_format_is_the_one_asked_for(size, channels, dtype):
    pixels = torch.ones(*size, channels, dtype=torch.uint8)
    mean, std = [0.5] * channels, [0.5] * channels
    batch, height, width = size
    last = Normalize(mean, std, dtype)(pixels)
    assert last.shape == (batch, channels, height, width)
    assert last.is_contiguous(memory_format=torch.channels_last)
    assert last.stride() == last.contiguous(memory_format=torch.channels_last).stride()
    first = Normalize(mean, std, dtype, channels_last=False)(pixels)
    assert first.shape == last.shape
    assert first.is_contiguous()
    assert torch.equal(first, last)


@pytest.mark.usefixtures("way")
def test_a_single_image_is_a_batch_without_its_first_axis(photos):
    for channels_last in (True, False):
        normalize = Normalize(MEAN, STD, channels_last=channels_last)
        one, batch = normalize(photos[1]), normalize(photos)
        assert torch.equal(one, batch[1])
        assert one.stride() == batch[1].stride()


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("channels_last", [True, False])
def test_stacks_of_several_pictures_per_sample_are_normalised_where_they_are_named(photos, channels_last):
    stack, normalize = photos[:, None].repeat(1, 3, 1, 1, 1), Normalize(MEAN, STD, torch.float32, channels_last)
    named = Normalize(MEAN, STD, torch.float32, channels_last, fields="image")
    batch = named({"image": (photos, stack)})
    assert torch.equal(batch["image"][0], normalize(photos))
    assert batch["image"][1].shape == (2, 3, 3, 5, 7)
    for number in range(3):
        assert torch.equal(batch["image"][1][:, number], normalize(photos))


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("channels_last", [True, False])
def test_crops_and_images_in_another_memory_order_come_out_the_same(photos, channels_last):
    normalize = Normalize(MEAN, STD, channels_last=channels_last)
    planes = photos.movedim(-1, 1).contiguous().movedim(1, -1)
    for view in (photos[:, 1:4, 2:6], photos.flip(2), planes, photos[::2]):
        got, wanted = normalize(view), normalize(view.contiguous())
        assert torch.equal(got, wanted)
        assert got.stride() == wanted.stride()


def test_the_pixels_are_not_changed(photos):
    before = photos.clone()
    Normalize(MEAN, STD)(photos)
    Normalize(MEAN, STD, torch.float32)({"image": photos})
    assert torch.equal(photos, before)


class Recorder(TorchDispatchMode):
    """The operators that run, and the memory that each result takes unless an operand has it."""

    def __init__(self):
        super().__init__()
        self.names = []
        self.nbytes = 0
        self._seen = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.names.append(function.__name__)
        storage = result.untyped_storage()
        if storage.data_ptr() not in self._seen:
            self._seen.add(storage.data_ptr())
            self.nbytes += storage.nbytes()
        return result


def recorded(normalize, pixels):
    normalize(pixels)  # the first call makes the constants
    with Recorder() as recorder:
        recorder._seen.add(pixels.untyped_storage().data_ptr())
        normalize(pixels)
    return recorder


@pytest.mark.parametrize("dtype", DTYPES)
def test_with_casts_in_the_kernel_one_operator_writes_the_result_and_nothing_else(photos, dtype, monkeypatch):
    monkeypatch.setattr(normalize_module, "_CASTS_IN_KERNELS", ("cpu",))
    ran = recorded(Normalize(MEAN, STD, dtype), photos)
    assert [name.split(".")[0] for name in ran.names if name.split(".")[0] not in ("movedim", "permute")] == [
        "empty",
        "addcmul",
    ]
    assert ran.nbytes == photos.numel() * dtype.itemsize


@pytest.mark.parametrize(("dtype", "bytes_per_pixel"), [(torch.float32, 4), (torch.bfloat16, 4 + 2)])
def test_elsewhere_it_makes_no_more_than_one_float32_copy(photos, dtype, bytes_per_pixel):
    assert recorded(Normalize(MEAN, STD, dtype), photos).nbytes == photos.numel() * bytes_per_pixel


def test_mean_and_std_go_to_a_device_once(photos, monkeypatch):
    made = []
    tensor = torch.tensor
    monkeypatch.setattr(
        torch, "tensor", lambda *args, **kwargs: made.append(kwargs["device"]) or tensor(*args, **kwargs)
    )
    normalize = Normalize(MEAN, STD)
    for _ in range(3):
        normalize(photos)
        normalize({"image": photos})
    assert made == [torch.device("cpu")]
    # The meta device stands for a second one.
    assert normalize(photos.to("meta")).device.type == "meta"
    assert [device.type for device in made] == ["cpu", "meta"]


# -- batches

Pair = namedtuple("Pair", "image label")


@dataclasses.dataclass(frozen=True)
class Sample:
    image: torch.Tensor
    name: str


@pytest.mark.parametrize(
    "wrap",
    [
        lambda image: {"image": image, "label": torch.arange(2)},
        lambda image: (image, torch.arange(2)),
        lambda image: [image, "names"],
        lambda image: Pair(image, None),
        lambda image: Sample(image, "a"),
        lambda image: {"meta": [{"views": (image, image)}], "mask": torch.zeros(2, 5, 7, dtype=torch.uint8)},
    ],
)
def test_images_are_found_wherever_they_are_and_all_else_passes_as_it_is(photos, wrap):
    normalize, batch = Normalize(MEAN, STD), wrap(photos)
    before = list(leaves(batch))
    got = normalize(batch)
    assert type(got) is type(batch)
    for (path, leaf), (old_path, old) in zip(leaves(got), before, strict=True):
        assert path == old_path
        assert torch.equal(leaf, normalize(photos)) if old is photos else leaf is old
    assert all(now is old for (_, now), (_, old) in zip(leaves(batch), before, strict=True))  # not changed in place


def test_other_uint8_tensors_are_no_images(photos):
    batch = {
        "image": photos,
        "depth": torch.zeros(2, 5, 7, 1, dtype=torch.uint8),
        "flat": torch.zeros(2, 3, dtype=torch.uint8),
        "clip": torch.zeros(2, 4, 5, 7, 3, dtype=torch.uint8),
        "array": photos.numpy(),
    }
    got = Normalize(MEAN, STD)(batch)
    assert [name for name in batch if got[name] is not batch[name]] == ["image"]


def test_named_fields_alone_are_normalised(photos):
    batch = {"views": {"left": photos, "right": photos}, "target": photos}
    got = Normalize(MEAN, STD, fields="views.left")(batch)
    assert got["views"]["left"].dtype == torch.bfloat16
    assert got["views"]["right"] is got["target"] is photos
    got = Normalize(MEAN, STD, fields=["views"])(batch)
    assert got["views"]["left"].dtype == got["views"]["right"].dtype == torch.bfloat16
    assert got["target"] is photos
    assert Normalize(MEAN, STD, fields=["1"])([photos, photos])[0] is photos


class Photos:
    def __len__(self):
        return 6

    def __getitem__(self, index):
        return {
            "image": np.full((4, 5, 3), index, np.uint8),
            "crop": np.full((2 + index, 3, 3), index, np.uint8),
            "label": index,
        }


@pytest.mark.parametrize("fields", [None, ["image", "crop"]])
def test_it_finishes_what_the_loader_delivers(fields):
    loader = DataLoader(Photos(), 4, fields={"crop": Field(ragged=True)})
    normalize = Normalize((0, 0, 0), (1, 1, 1), torch.float32, fields=fields)
    sizes = []
    for batch in DevicePrefetcher(loader, "cpu", transform=normalize):
        sizes.append(len(batch["label"]))
        wanted = batch["label"].float() / 255
        torch.testing.assert_close(batch["image"], wanted[:, None, None, None].expand(-1, 3, 4, 5))
        assert type(batch["crop"]) is Ragged
        for label, crop in zip(batch["label"].tolist(), batch["crop"], strict=True):
            assert crop.shape == ((2 + label, 3, 3) if fields is None else (3, 2 + label, 3))
    assert sizes == [4, 2]


# -- copies, compilation


def test_it_can_be_pickled_and_copied_before_and_after_use(photos):
    normalize = Normalize(MEAN, STD, torch.float16, channels_last=False, fields=["image"])
    for _ in range(2):
        for other in (pickle.loads(pickle.dumps(normalize)), copy.deepcopy(normalize)):
            assert not other._constants  # made where it is used
            assert torch.equal(other({"image": photos})["image"], normalize(photos))
            assert other(photos).is_contiguous()
    assert repr(normalize) == repr(other)


def test_compiled_it_gives_the_same_result(photos):
    if not torch._dynamo.is_dynamo_supported():
        pytest.skip("this torch compiles nothing on this Python")
    normalize = Normalize(MEAN, STD)
    wanted = normalize(photos)
    compiled = torch.compile(normalize, backend="eager")
    for _ in range(2):
        got = compiled({"image": photos, "label": torch.arange(2)})["image"]
        assert torch.equal(got, wanted)
        assert got.is_contiguous(memory_format=torch.channels_last)


# -- refusals


@pytest.mark.parametrize(
    ("mean", "std"),
    [((0.5,), (0.5, 0.5)), ((), ()), ((0.5,), (0.0,)), ((0.5,), (float("nan"),)), ((float("inf"),), (1,))],
)
def test_a_mean_and_std_that_make_no_sense_are_refused_at_once(mean, std):
    with pytest.raises(ValueError, match=r"mean=.*std=.*: expected"):
        Normalize(mean, std)


def test_an_empty_list_of_fields_is_refused_at_once():
    with pytest.raises(ValueError, match="fields is empty"):
        Normalize(MEAN, STD, fields=[])


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float64, "bfloat16"])
def test_a_dtype_that_it_cannot_give_is_refused_at_once(dtype):
    with pytest.raises(DtypeError, match=r"expected one of torch\.bfloat16, torch\.float16, torch\.float32"):
        Normalize(MEAN, STD, dtype)


@pytest.mark.parametrize(
    ("image", "error", "message"),
    [
        (torch.zeros(2, 5, 7, 3), DtypeError, r"float32 tensor of shape \(2, 5, 7, 3\): expected uint8"),
        (torch.zeros(2, 3, 5, 7, dtype=torch.uint8), ImageShapeError, r"\(2, 3, 5, 7\): expected \(B, H, W, 3\)"),
        (torch.zeros(5, 3, dtype=torch.uint8), ImageShapeError, r"\(5, 3\): expected \(B, H, W, 3\) or \(H, W, 3\)"),
        (torch.zeros(2, 5, 7, 1, dtype=torch.uint8), ImageShapeError, r"one channel per mean"),
        (torch.zeros((), dtype=torch.uint8), ImageShapeError, r"shape \(\)"),
    ],
)
def test_what_is_no_image_is_refused_alone_and_by_name(image, error, message):
    with pytest.raises(error, match=message):
        Normalize(MEAN, STD)(image)
    with pytest.raises(error, match=f'field "a.x": .*{message}'):
        Normalize(MEAN, STD, fields=["a.x"])({"a": {"x": image}})


def test_a_named_field_must_be_a_tensor(photos):
    with pytest.raises(ArrayKindError, match='field "image": expected a uint8 tensor, got ndarray'):
        Normalize(MEAN, STD, fields=["image"])({"image": photos.numpy()})


def test_an_unknown_field_is_refused_with_those_that_there_are(photos):
    with pytest.raises(FieldNameError, match=r'no field "img". It has "image": uint8 tensor .*, "n": int') as caught:
        Normalize(MEAN, STD, fields=["image", "img"])({"image": photos, "n": 1})
    assert caught.value.field == "img"
    with pytest.raises(FieldNameError, match='no field "ima"'):
        Normalize(MEAN, STD, fields=["ima"])({"image": photos})


@pytest.mark.parametrize("batch", [{}, [], {"image": torch.zeros(2, 5, 7, 3)}, np.zeros((2, 5, 7, 3), np.uint8), None])
def test_a_batch_with_nothing_to_normalise_is_refused(batch):
    with pytest.raises(FieldNameError, match=r"nothing to normalise\. It has .*; expected a uint8 tensor of shape"):
        Normalize(MEAN, STD)(batch)
