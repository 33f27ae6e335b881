"""The way back to NumPy on a real CUDA device. Kernels are slowed down: a missing wait shows as wrong values."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from loaders import OutputCollector, ScalarLog, transfer_time
from loaders.device.side_stream import SideStream
from loaders.outputs import collector as collector_module
from loaders.outputs.collector import Readback

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device here"),
]

STEPS = 40
WIDTH = 1 << 18
SPIN = 5_000_000  # clock cycles: many times the copy of a batch


class NoWaitForCompute(Readback):
    def wait_for_compute(self):
        pass


def wrong_rows(tmp_path=None, index_on_device=False):
    collector = OutputCollector(2 * STEPS, tmp_path and tmp_path / "out.npy")
    order = np.random.default_rng(0).permutation(2 * STEPS)
    for step in range(STEPS):
        rows = torch.from_numpy(order[2 * step : 2 * step + 2])
        on_device = rows.cuda()
        torch.cuda._sleep(SPIN)
        output = on_device[:, None].float().expand(2, WIDTH) + 0
        collector.add(output, on_device if index_on_device else rows)
        del output, on_device
        # What lies in freed memory by now.
        torch.full((2, WIDTH), -1.0, device="cuda")
    result = collector.result()
    return int((result != np.arange(2 * STEPS)[:, None]).any(axis=1).sum())


@pytest.mark.parametrize("index_on_device", [False, True])
def test_every_row_comes_back_as_it_was_made(tmp_path, index_on_device):
    assert wrong_rows(index_on_device=index_on_device) == 0
    assert wrong_rows(tmp_path, index_on_device) == 0


def test_without_the_wait_for_the_kernels_rows_are_wrong(monkeypatch):
    naive = NoWaitForCompute(SideStream(torch.device("cuda", torch.cuda.current_device())))
    original = collector_module.readback_of
    monkeypatch.setattr(collector_module, "readback_of", lambda tensor: naive if original(tensor) else None)
    assert wrong_rows() > 0


def test_adding_does_not_wait_for_the_device():
    collector, log = OutputCollector(), ScalarLog(every=1)
    x = torch.ones(2, 3, device="cuda", dtype=torch.bfloat16)
    collector.add(x)  # page-locks its first memory, which may wait
    log.add({"mean": x.mean()})
    torch.cuda.synchronize()
    torch.cuda._sleep(50 * SPIN)
    collector.add(x)
    told = log.add({"mean": x.mean() * 2})
    assert not torch.cuda.current_stream().query()
    assert told in (None, {"mean": 1.0})
    assert log.flush() is not None
    result = collector.result()
    assert result.dtype == np.float32
    assert np.array_equal(result, np.ones((4, 3)))


def test_events_time_what_the_device_does():
    slow = transfer_time(lambda: torch.cuda._sleep(4 * SPIN), runs=5)
    fast = transfer_time(lambda: torch.cuda._sleep(SPIN), runs=5)
    assert 2 < slow.median_s / fast.median_s < 8
