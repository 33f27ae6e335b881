import dataclasses
from collections import OrderedDict, namedtuple
from typing import Any

import numpy as np
import pytest
import torch

from loaders.bridge import nests, shares_memory, to_numpy
from loaders.errors import ArrayKindError, DtypeError
from loaders.nested import leaves

Pair = namedtuple("Pair", "logits features")


@dataclasses.dataclass(frozen=True)
class Output:
    loss: Any
    hidden: Any
    name: str = "net"


def nested():
    x = torch.arange(6.0).reshape(2, 3)
    return {
        "out": Pair(x, [x.t(), (x[0], 5)]),
        "dc": Output(loss=x.sum().requires_grad_(), hidden={"half": x.bfloat16(), "none": None}),
        "text": "kept",
        "array": np.arange(3),
    }


def test_every_tensor_becomes_an_array_and_every_container_stays():
    result = to_numpy(nested())
    assert isinstance(result["out"], Pair)
    assert isinstance(result["out"].features, list)
    assert isinstance(result["out"].features[1], tuple)
    assert isinstance(result["dc"], Output)
    assert result["dc"].loss.shape == ()
    assert result["dc"].loss == 15
    assert result["dc"].hidden["half"].dtype == np.float32
    assert result["dc"].hidden["none"] is None
    assert (result["text"], result["dc"].name, result["out"].features[1][1]) == ("kept", "net", 5)
    np.testing.assert_array_equal(result["out"].features[0], np.arange(6.0).reshape(2, 3).T)
    assert isinstance(to_numpy(OrderedDict(a=torch.zeros(1))), OrderedDict)
    assert isinstance(to_numpy(torch.zeros(1)), np.ndarray)
    assert to_numpy({}) == {}


def test_every_array_is_owned_writeable_and_shared_with_nothing():
    tree = nested()
    tree["again"] = tree["out"].logits  # the same tensor twice
    sources = [leaf for _, leaf in leaves(tree) if isinstance(leaf, (torch.Tensor, np.ndarray))]
    results = [leaf for _, leaf in leaves(to_numpy(tree)) if isinstance(leaf, np.ndarray)]
    assert len(results) == len(sources) == 7
    for i, array in enumerate(results):
        assert array.flags.owndata
        assert array.flags.writeable
        assert array.flags.c_contiguous
        assert not any(shares_memory(array, source) for source in sources)
        assert not any(shares_memory(array, other) for other in results[:i])


def test_conj_neg_expanded_and_inference_tensors_come_with_their_values():
    conj = torch.tensor([1 + 2j]).conj()
    with torch.inference_mode():
        inference = torch.ones(2)
        assert to_numpy(inference).tolist() == [1, 1]
    result = to_numpy([conj, conj.imag, torch.ones(1).expand(3), inference])
    assert [array.tolist() for array in result] == [[1 - 2j], [-2.0], [1, 1, 1], [1, 1]]


def test_packed_sequences_and_torchs_own_tuples_pass():
    packed = torch.nn.utils.rnn.pack_sequence([torch.ones(2), torch.zeros(1)])
    result = to_numpy(packed)
    assert result.batch_sizes.tolist() == [2, 1]
    assert result.data.tolist() == [1, 0, 1]
    values, indices = to_numpy(torch.max(torch.tensor([[1.0, 3.0]]), 1))
    assert (values.tolist(), indices.tolist()) == ([3.0], [1])


def test_masked_arrays_keep_their_mask():
    masked = np.ma.MaskedArray([1, 2], [True, False])
    assert to_numpy({"m": masked})["m"].mask.tolist() == [True, False]


def test_errors_name_the_place_in_the_tree():
    with pytest.raises(ArrayKindError, match=r'^"0\.mask": float32 tensor.*\n  Call tensor\.to_dense\(\)'):
        to_numpy([{"mask": torch.eye(2).to_sparse()}])
    with pytest.raises(DtypeError, match=r'^"bits": '):
        to_numpy({"bits": torch.zeros(2, dtype=torch.uint8).view(torch.bits8)})
    with pytest.raises(ArrayKindError, match=r"^float32 tensor"):
        to_numpy(torch.zeros(2, device="meta"))


class PretendDevice:
    """Stands in for accelerators: transfers are queued, and bytes arrive only when their device is waited for."""

    def __init__(self):
        self.queued = []
        self.log = []

    def begin_transfer(self, plain):
        device = torch.device("cuda", int(plain.flatten()[0]) % 2)  # the first value says which device
        host = torch.full_like(plain, -1)
        self.queued.append((device, host, plain))
        self.log.append("transfer")
        return host, device

    def wait_for(self, device):
        self.log.append(f"wait {device}")
        for where, host, plain in self.queued:
            if where == device:
                host.copy_(plain)


@pytest.fixture
def pretend(monkeypatch):
    device = PretendDevice()
    monkeypatch.setattr(nests, "_begin_transfer", device.begin_transfer)
    monkeypatch.setattr(nests, "_wait_for", device.wait_for)
    return device


def test_one_wait_for_the_whole_tree_after_all_transfers_are_queued(pretend):
    tree = {"a": torch.tensor([0, 1]), "b": [torch.tensor([2]), (torch.tensor([4]), "x")]}
    result = to_numpy(tree)
    assert pretend.log == ["transfer"] * 3 + ["wait cuda:0"]
    assert result["a"].tolist() == [0, 1]
    assert result["b"][1][0].tolist() == [4]


def test_one_wait_per_device(pretend):
    result = to_numpy([torch.tensor([n]) for n in range(6)])
    assert pretend.log == ["transfer"] * 6 + ["wait cuda:0", "wait cuda:1"]
    assert [array.tolist() for array in result] == [[n] for n in range(6)]


def test_host_tensors_are_not_waited_for(monkeypatch):
    monkeypatch.setattr(nests, "_wait_for", lambda device: pytest.fail(f"waited for {device}"))
    assert to_numpy([torch.zeros(1), torch.ones(1)]) == [0, 1]


def test_without_page_locked_memory_a_transfer_waits_by_itself(monkeypatch):
    to = torch.Tensor.to

    def needs_pinned_memory(tensor, *arguments, non_blocking=False):
        if non_blocking:
            raise NotImplementedError("You should register a hook and implement `getPinnedMemoryAllocator`.")
        return to(tensor, *arguments)

    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cpu"))
    monkeypatch.setattr(torch.Tensor, "to", needs_pinned_memory)
    monkeypatch.setattr(nests, "_wait_for", lambda device: pytest.fail(f"waited for {device}"))
    assert to_numpy({"n": torch.arange(3)})["n"].tolist() == [0, 1, 2]


def test_a_device_that_fails_in_a_transfer_is_not_asked_again(monkeypatch):
    def fails(*_, **__):
        raise torch.AcceleratorError("the device has failed")

    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cpu"))
    monkeypatch.setattr(torch.Tensor, "to", fails)
    with pytest.raises(torch.AcceleratorError, match="has failed"):
        to_numpy(torch.arange(3))
