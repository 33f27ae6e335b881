"""MixUp and CutMix against NumPy, given the same generator; their labels, their keys, and what they leave alone."""

from __future__ import annotations

import copy
import dataclasses
import math
import pickle
from collections import namedtuple

import numpy as np
import pytest
import torch
from support.chance import chi_square_p
from torch.utils._python_dispatch import TorchDispatchMode

from loaders import CutMix, DevicePrefetcher, MixUp, Normalize
from loaders.errors import ArrayKindError, DtypeError, FieldNameError, FieldShapeError, ImageShapeError
from loaders.nested import leaves
from loaders.randomness.streams import Domain, KeyedGenerator, enter_sample, leave_sample

CLASSES = 5
FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
PIXELS = torch.uint8


@pytest.fixture(autouse=True)
def nobody_reads():
    yield
    leave_sample()


def keyed(mixing, batch, position=0):
    enter_sample(3, 1, position, Domain.COLLATE)
    return mixing(batch)


def generator(position=0):
    """The one that `keyed` draws from."""
    return KeyedGenerator().rekey(Domain.COLLATE, 3, 1, position)


def images(dtype=PIXELS, size=(4, 9, 13, 3)):
    """As a loader delivers them, or as Normalize makes them of these."""
    pixels = torch.from_numpy(np.random.default_rng(0).integers(0, 256, size, np.uint8))
    return pixels if dtype == PIXELS else (pixels.movedim(-1, 1).to(torch.float64) / 64 - 2).to(dtype)


def batch_of(dtype=PIXELS, size=(4, 9, 13, 3)):
    return {"image": images(dtype, size), "label": torch.arange(size[0]) % CLASSES}


def one_hot(labels):
    return np.eye(CLASSES)[np.asarray(labels)]


def blended(values, share):
    """float64: 1 - share of each row and share of the one before it."""
    return values * (1 - share) + np.roll(values, 1, 0) * share


def box(rng, height, width, share):
    """The rows and columns of the authors' code for CutMix."""
    cut_height, cut_width = int(height * np.sqrt(share)), int(width * np.sqrt(share))
    x, y = rng.integers(width), rng.integers(height)
    rows = np.clip([y - cut_height // 2, y + cut_height // 2], 0, height)
    columns = np.clip([x - cut_width // 2, x + cut_width // 2], 0, width)
    return slice(*rows), slice(*columns)


# -- values


@pytest.mark.parametrize("position", range(8))
@pytest.mark.parametrize("dtype", [PIXELS, *FLOATS])
def test_mixup_is_what_numpy_makes_of_the_same_draws(dtype, position):
    batch = batch_of(dtype)
    got = keyed(MixUp(CLASSES, alpha=0.8), batch, position)
    share = 1 - generator(position).beta(0.8, 0.8)
    wanted = torch.from_numpy(blended(batch["image"].double().numpy(), share))
    assert got["image"].dtype == dtype
    if dtype == PIXELS:
        assert (got["image"].double() - wanted).abs().max() <= 0.5 + 1e-4  # to the nearest
    else:
        step = torch.finfo(dtype).eps if dtype in (torch.float32, torch.float64) else 1e-6
        low, high = (wanted - 4 * step).to(dtype), (wanted + 4 * step).to(dtype)
        assert ((low <= got["image"]) & (got["image"] <= high)).all()  # computed in float32, rounded once
    assert got["label"].dtype == torch.float32
    np.testing.assert_allclose(got["label"], blended(one_hot(batch["label"]), share), atol=1e-7)


@pytest.mark.parametrize("position", range(8))
@pytest.mark.parametrize("dtype", [PIXELS, *FLOATS])
def test_cutmix_is_what_numpy_makes_of_the_same_draws(dtype, position):
    batch = batch_of(dtype)
    got = keyed(CutMix(CLASSES), batch, position)
    rng = generator(position)
    rows, columns = box(rng, 9, 13, 1 - rng.beta(1.0, 1.0))
    wanted = batch["image"].clone()
    inside = (slice(None), rows, columns) if dtype == PIXELS else (slice(None), slice(None), rows, columns)
    wanted[inside] = batch["image"].roll(1, 0)[inside]
    assert got["image"].dtype == dtype
    assert torch.equal(got["image"], wanted)
    share = (rows.stop - rows.start) * (columns.stop - columns.start) / (9 * 13)
    np.testing.assert_allclose(got["label"], blended(one_hot(batch["label"]), share), atol=1e-7)


def test_some_boxes_are_clipped_and_the_label_counts_what_is_left():
    whole, clipped = 0, 0
    batch = {"image": torch.zeros(2, 1, 32, 32), "label": torch.tensor([0, 1])}
    batch["image"][1] = 1
    for position in range(60):
        got = keyed(CutMix(2), batch, position)
        area = float(got["image"][0].mean())
        assert float(got["label"][0, 1]) == pytest.approx(area, abs=1e-6)
        assert float(got["label"][1, 0]) == pytest.approx(area, abs=1e-6)
        drawn = 1 - generator(position).beta(1.0, 1.0)
        unclipped = (int(32 * math.sqrt(drawn)) // 2 * 2 / 32) ** 2
        assert area <= unclipped
        clipped += area < unclipped
        whole += area == unclipped > 0
    assert clipped > 20
    assert whole > 5


def test_equal_neighbours_stay_as_they_are():
    for dtype in (PIXELS, *FLOATS):
        batch = batch_of(dtype)
        batch = {"image": batch["image"][:1].repeat(3, 1, 1, 1), "label": torch.tensor([2, 2, 2])}
        for mixing in (MixUp(CLASSES, 1.0), CutMix(CLASSES)):
            got = keyed(mixing, batch)
            assert torch.equal(got["image"], batch["image"])
            np.testing.assert_allclose(got["label"], one_hot([2, 2, 2]), atol=1e-7)


# -- labels


@pytest.mark.parametrize("mixing", [MixUp(CLASSES, 1.0), CutMix(CLASSES)])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16])
def test_integer_labels_of_any_width_become_soft_and_sum_to_one(mixing, dtype):
    batch = batch_of()
    got = keyed(mixing, {**batch, "label": batch["label"].to(dtype)})
    assert torch.equal(got["label"], keyed(mixing, batch)["label"])
    np.testing.assert_allclose(got["label"].sum(1), 1, atol=1e-6)
    assert (got["label"] >= 0).all()


@pytest.mark.parametrize("dtype", FLOATS)
def test_soft_labels_are_mixed_as_they_are(dtype):
    soft = torch.tensor([[0.5, 0.5, 0, 0, 0], [0, 0, 1, 0, 0], [0.25] * 4 + [0], [0, 0, 0, 0, 1]], dtype=dtype)
    got = keyed(MixUp(CLASSES, 1.0), {**batch_of(), "label": soft})
    assert got["label"].dtype == torch.float32
    share = 1 - generator().beta(1.0, 1.0)
    np.testing.assert_allclose(got["label"], blended(soft.double().numpy(), share), atol=1e-7)


def test_one_mixing_follows_the_other_with_draws_of_its_own():
    mixup, cutmix = MixUp(CLASSES, 1.0), CutMix(CLASSES)
    batch = batch_of(torch.float32)
    got = keyed(lambda batch: cutmix(mixup(batch)), batch)
    rng = generator()
    first = 1 - rng.beta(1.0, 1.0)
    rows, columns = box(rng, 9, 13, 1 - rng.beta(1.0, 1.0))
    wanted = blended(batch["image"].double().numpy(), first)
    wanted[:, :, rows, columns] = np.roll(wanted, 1, 0)[:, :, rows, columns]
    np.testing.assert_allclose(got["image"], wanted, atol=1e-6)
    second = (rows.stop - rows.start) * (columns.stop - columns.start) / (9 * 13)
    np.testing.assert_allclose(got["label"], blended(blended(one_hot(batch["label"]), first), second), atol=1e-6)
    np.testing.assert_allclose(got["label"].sum(1), 1, atol=1e-6)


@pytest.mark.parametrize("number", [-100, -1, CLASSES, 2**40])
def test_a_class_that_does_not_exist_counts_as_none(number):
    batch = {**batch_of(), "label": torch.tensor([0, number, 0, 0])}
    got = keyed(MixUp(CLASSES, 1.0), batch)["label"]
    share = 1 - generator().beta(1.0, 1.0)
    np.testing.assert_allclose(got.sum(1), [1, share, 1 - share, 1], atol=1e-6)


# -- keys


@pytest.mark.parametrize("mixing", [MixUp(CLASSES), CutMix(CLASSES)])
def test_the_same_key_mixes_alike_and_another_does_not(mixing):
    batch = batch_of(torch.float32, (4, 64, 64, 3))
    mixes = [keyed(mixing, batch, position)["image"] for position in range(20)]
    torch.manual_seed(1)
    np.random.seed(1)  # the process's own generators play no part
    again = [keyed(copy.deepcopy(mixing), batch, position)["image"] for position in range(20)]
    assert all(torch.equal(one, other) for one, other in zip(mixes, again, strict=True))
    different = {image.numpy().tobytes() for image in mixes}
    # At alpha 0.2 some lambdas are 1 in float32, and a box may be empty: those batches stay as they are.
    assert len(different) >= 17


def test_outside_of_a_loader_torchs_seed_decides():
    batch = batch_of(torch.float32)

    def mixes(seed):
        torch.manual_seed(seed)
        return [MixUp(CLASSES, 1.0)(batch)["image"].numpy().tobytes() for _ in range(3)]

    assert mixes(0) == mixes(0)
    assert len({*mixes(0), *mixes(1)}) == 6


def test_lambda_of_mixup_is_beta_distributed():
    batch = {"image": torch.zeros(2, 1, 1, 1), "label": torch.tensor([0, 1])}
    drawn = np.array([float(keyed(MixUp(2, 1.0), batch, position)["label"][0, 0]) for position in range(1000)])
    assert chi_square_p(np.histogram(drawn, 20, (0, 1))[0], 50) > 1e-4
    drawn = np.array([float(keyed(MixUp(2, 0.2), batch, position)["label"][0, 0]) for position in range(1000)])
    assert abs(drawn.mean() - 0.5) < 5 * drawn.std() / math.sqrt(1000)
    # The variance of Beta(a, a) is 1 / (4 (2 a + 1)).
    assert drawn.var() == pytest.approx(1 / 5.6, rel=0.1)


# -- what is kept


@pytest.mark.parametrize("mixing", [MixUp(CLASSES, 1.0), CutMix(CLASSES)])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", FLOATS)
def test_the_memory_format_is_kept(mixing, memory_format, dtype):
    batch = batch_of(dtype)
    batch["image"] = batch["image"].contiguous(memory_format=memory_format)
    got = keyed(mixing, batch)["image"]
    assert got.stride() == batch["image"].stride()


@pytest.mark.parametrize("mixing", [MixUp(CLASSES, 1.0), CutMix(CLASSES)])
@pytest.mark.parametrize("dtype", [PIXELS, torch.bfloat16])
def test_the_batch_that_came_is_not_changed(mixing, dtype):
    soft = torch.rand(4, CLASSES)
    for label in (torch.arange(4), soft):
        batch = {"image": images(dtype), "label": label, "name": ["a", "b", "c", "d"]}
        before = copy.deepcopy(batch)
        got = keyed(mixing, batch)
        assert torch.equal(batch["image"], before["image"])
        assert torch.equal(batch["label"], before["label"])
        assert not torch.equal(got["image"], batch["image"])
        assert got["name"] == batch["name"]
        memory = {batch[name].untyped_storage().data_ptr() for name in ("image", "label")}
        assert memory.isdisjoint(got[name].untyped_storage().data_ptr() for name in ("image", "label"))


Pair = namedtuple("Pair", "photo target")


@dataclasses.dataclass
class Sample:
    image: torch.Tensor
    label: torch.Tensor


@pytest.mark.parametrize("mixing", [MixUp, CutMix])
@pytest.mark.parametrize(
    ("wrap", "names"),
    [
        (lambda image, label: (image, label, "more"), {}),
        (lambda image, label: [image, label], {}),
        (Pair, {}),
        (Sample, {}),
        (lambda image, label: (label, image), {"image": 1, "label": 0}),
        (lambda image, label: Pair(label, image), {"image": "target", "label": "photo"}),
        (lambda image, label: {"x": image, "y": label}, {"image": "x", "label": "y"}),
        (lambda image, label: {"x": [0, image], "meta": {"y": label}}, {"image": "x.1", "label": "meta.y"}),
    ],
)
def test_image_and_label_are_found_in_every_kind_of_batch(mixing, wrap, names):
    image, label = batch_of().values()
    wanted = keyed(mixing(CLASSES, 1.0), {"image": image, "label": label})
    batch = wrap(image, label)
    got = keyed(mixing(CLASSES, 1.0, **names), batch)
    assert type(got) is type(batch)
    for (_, new), (_, old) in zip(leaves(got), leaves(batch), strict=True):
        if old is image:
            assert torch.equal(new, wanted["image"])
        elif old is label:
            assert torch.equal(new, wanted["label"])
        else:
            assert new is old


@pytest.mark.parametrize("mixing", [MixUp(CLASSES, 1.0), CutMix(CLASSES)])
@pytest.mark.parametrize("dtype", [PIXELS, torch.bfloat16, torch.float32])
def test_batches_of_no_or_one_sample_stay_as_they_are(mixing, dtype):
    for rows in (0, 1):
        batch = batch_of(dtype, (rows, 9, 13, 3))
        got = keyed(mixing, batch)
        assert torch.equal(got["image"], batch["image"])
        np.testing.assert_allclose(got["label"], one_hot(batch["label"]).reshape(rows, CLASSES), atol=1e-7)


def test_they_can_be_pickled():
    for mixing in (MixUp(CLASSES, 0.5, image="x", label="y"), CutMix(CLASSES)):
        other = pickle.loads(pickle.dumps(mixing))
        assert vars(other) == vars(mixing)
        assert repr(other) == repr(mixing)


# -- on the device


class HostCopies(TorchDispatchMode):
    """Fails where the host would wait for a device, or send it a tensor."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert "_local_scalar_dense" not in str(function)
        assert "lift_fresh" not in str(function), "a tensor made of host values"
        assert "nonzero" not in str(function)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("mixing", [MixUp(CLASSES, 1.0), CutMix(CLASSES)])
@pytest.mark.parametrize("dtype", [PIXELS, torch.bfloat16])
@pytest.mark.parametrize("soft", [False, True])
def test_nothing_is_read_from_the_device_or_sent_to_it(mixing, dtype, soft):
    # Tensors of the meta device have no values: reading one raises.
    batch = {"image": images(dtype).to("meta"), "label": torch.arange(4, device="meta")}
    if soft:
        batch["label"] = torch.zeros(4, CLASSES, device="meta")
    enter_sample(0, 0, 0)
    with HostCopies():
        got = mixing(batch)
    assert got["image"].device.type == got["label"].device.type == "meta"
    assert got["label"].shape == (4, CLASSES)
    with pytest.raises(AssertionError), HostCopies():
        torch.zeros(1).item()


def test_it_follows_normalize_behind_the_loader():
    normalize, cutmix = Normalize((0.5,) * 3, (0.5,) * 3), CutMix(CLASSES)
    batches = [batch_of(), batch_of()]
    for batch in DevicePrefetcher(batches, "cpu", transform=lambda batch: cutmix(normalize(batch))):
        assert batch["image"].dtype == torch.bfloat16
        assert batch["image"].is_contiguous(memory_format=torch.channels_last)
        assert batch["label"].shape == (4, CLASSES)


# -- refusals


@pytest.mark.parametrize("mixing", [MixUp, CutMix])
def test_arguments_that_make_no_sense_are_refused_at_once(mixing):
    for classes in (0, -1, 2.0, None):
        with pytest.raises(ValueError, match=r"num_classes=.*expected the number of classes"):
            mixing(classes)
    for alpha in (0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match=r"alpha=.*expected a positive number"):
            mixing(CLASSES, alpha)


LABELS = torch.arange(4)


@pytest.mark.parametrize("mixing", [MixUp(CLASSES), CutMix(CLASSES)])
@pytest.mark.parametrize(
    ("batch", "error", "message"),
    [
        ({"img": images(), "label": LABELS}, FieldNameError, 'no image by the name of "image". It has "img": uint8'),
        ({"image": images()}, FieldNameError, 'no label by the name of "label"'),
        ((images(),), FieldNameError, 'no label by the name of "1"'),
        ((), FieldNameError, r'no image by the name of "0"\. It has no fields'),
        (images(), FieldNameError, 'no image by the name of "image"'),
        ({"image": images().numpy(), "label": LABELS}, ArrayKindError, 'field "image": expected a tensor, got ndarray'),
        ({"image": images(), "label": "cat"}, ArrayKindError, 'field "label": expected a tensor, got str'),
        ({"image": images().long(), "label": LABELS}, DtypeError, r'"image": int64 .*expected uint8 or floating'),
        ({"image": images()[0], "label": LABELS}, ImageShapeError, r'"image": uint8 .*\(9, 13, 3\): expected uint8'),
        ({"image": images(), "label": LABELS[:3]}, FieldShapeError, r'"label": int64 .*\(3,\): expected \(4,\)'),
        ({"image": images(), "label": LABELS[:, None]}, FieldShapeError, r"\(4, 1\): expected \(4,\)"),
        ({"image": images(), "label": LABELS.float()}, FieldShapeError, r"\(4,\): expected \(4, 5\): num_classes=5"),
        ({"image": images(), "label": torch.zeros(4, 6)}, FieldShapeError, r"\(4, 6\): expected \(4, 5\)"),
        ({"image": images(), "label": LABELS > 1}, DtypeError, r'"label": bool .*expected integers'),
    ],
)
def test_a_batch_that_does_not_fit_is_refused(mixing, batch, error, message):
    with pytest.raises(error, match=message):
        mixing(batch)


@pytest.mark.parametrize("image", [images().movedim(-1, 1), images(torch.float32).movedim(1, -1)])
def test_cutmix_refuses_channels_in_the_wrong_place(image):
    with pytest.raises(ImageShapeError, match=r"(?s)seems to be .*Move its channels"):
        CutMix(CLASSES)({"image": image, "label": LABELS})
    assert keyed(MixUp(CLASSES), {"image": image, "label": LABELS})["image"].shape == image.shape
