"""What runs on the device behind the prefetcher: as on the CPU, in as few kernels as said, and without a wait."""

from __future__ import annotations

import json
import warnings

import pytest
import torch
from support.pictures import Pictures

from loaders import CutMix, DataLoader, DevicePrefetcher, MixUp, Normalize
from loaders.randomness.streams import Domain, enter_sample, leave_sample

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device here"),
]

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
CLASSES = 10


@pytest.fixture
def refuse_implicit_waits():
    """Call it: from then on an operation of torch's that waits for the device raises."""

    def refuse():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch calls this debug mode a prototype
            torch.cuda.set_sync_debug_mode("error")

    yield refuse
    torch.cuda.set_sync_debug_mode("default")


def images(batch=4, height=37, width=29):
    return torch.randint(
        0, 256, (batch, height, width, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )


def activities(work, folder):
    """The kinds and names of what the device does in `work`."""
    torch.cuda.synchronize()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the profiler's
        with torch.profiler.profile(
            activities=[torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
        ) as profiler:
            work()
            torch.cuda.synchronize()
    profiler.export_chrome_trace(str(folder / "trace.json"))
    events = json.loads((folder / "trace.json").read_text(errors="replace"))["traceEvents"]
    return [(event["cat"], event["name"]) for event in events if event.get("cat") in DEVICE_WORK]


DEVICE_WORK = ("kernel", "gpu_memcpy", "gpu_memset")


# -- Normalize


@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_pixels_are_those_of_the_cpu_to_the_rounding_of_their_dtype(dtype, channels_last):
    normalize = Normalize(MEAN, STD, dtype, channels_last)
    expected, found = normalize(images()), normalize(images().cuda())
    assert found.is_cuda
    assert found.stride() == expected.stride()
    # A multiplication and an addition in float32 are rounded once there and twice here.
    torch.testing.assert_close(found.cpu(), expected, rtol=torch.finfo(dtype).eps, atol=2e-6)
    single = normalize(images()[0].cuda())
    assert torch.equal(single, found[0])


@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_it_is_one_kernel_and_no_copy(tmp_path, dtype, channels_last):
    normalize, pixels = Normalize(MEAN, STD, dtype, channels_last), images().cuda()
    normalize(pixels)
    activities(lambda: normalize(pixels), tmp_path)  # the profiler's own first time
    done = activities(lambda: normalize(pixels), tmp_path)
    assert [kind for kind, _ in done] == ["kernel"], done


# -- MixUp and CutMix


def keyed(mixing, batch):
    enter_sample(3, 1, 4, Domain.DEVICE)
    try:
        return mixing(batch)
    finally:
        leave_sample()


@pytest.mark.parametrize("mixing", [MixUp(CLASSES), CutMix(CLASSES)], ids=repr)
@pytest.mark.parametrize("dtype", [torch.uint8, *DTYPES])
def test_batches_are_mixed_as_on_the_cpu(mixing, dtype):
    image = images() if dtype == torch.uint8 else Normalize(MEAN, STD, dtype)(images())
    batch = {"image": image, "label": torch.tensor([3, 1, 4, 1])}
    on_device = {name: tensor.cuda() for name, tensor in batch.items()}
    before = on_device["image"].clone()
    expected, found = keyed(mixing, batch), keyed(mixing, on_device)
    assert found["image"].stride() == expected["image"].stride()
    assert torch.equal(on_device["image"], before)
    eps = 0 if dtype == torch.uint8 else 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(
        found["image"].cpu().float(), expected["image"].float(), rtol=eps, atol=1 if dtype == torch.uint8 else eps
    )
    torch.testing.assert_close(found["label"].cpu(), expected["label"])


# -- nothing waits


@pytest.mark.parametrize(
    "transform",
    [Normalize(MEAN, STD), Normalize(MEAN, STD, torch.float32, channels_last=False), MixUp(CLASSES), CutMix(CLASSES)],
    ids=lambda each: type(each).__name__,
)
def test_no_transform_waits_for_the_device_after_its_first_call(transform, refuse_implicit_waits):
    batch = {"image": images().cuda(), "label": torch.tensor([3, 1, 4, 1]).cuda()}
    transform(batch)
    refuse_implicit_waits()
    assert transform(batch)["image"].is_cuda
    with pytest.raises(RuntimeError, match="synchroniz"):  # it would have been seen
        batch["label"][0].item()


@pytest.mark.parametrize("static", [False, True])
def test_a_prefetcher_with_all_of_them_waits_for_nothing_between_its_batches(static, refuse_implicit_waits):
    normalize, mixup, cutmix = Normalize(MEAN, STD), MixUp(CLASSES), CutMix(CLASSES)

    def transform(batch):
        return cutmix(mixup(normalize(batch)))

    loader = DataLoader(Pictures(64), 4)
    prefetcher = DevicePrefetcher(loader, "cuda", transform=transform, static=static)
    for batch in prefetcher:
        del batch
    refuse_implicit_waits()
    count = 0
    for batch in prefetcher:
        assert batch["image"].dtype == torch.bfloat16
        assert batch["label"].shape == (4, CLASSES)
        count += 1
        del batch
    assert count == 16
