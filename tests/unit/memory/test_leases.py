"""Whatever alias of a batch is kept, in whatever library, its bytes stay; when it dies, the slot is free again."""

import copy
import ctypes
import gc
import os
import pickle
import subprocess
import sys
import textwrap
import threading
import warnings
import weakref

import numpy as np
import pytest
import torch
from support import inside

from loaders import DataLoader
from loaders.memory.arena import Arena
from loaders.memory.blocks import BlockState
from loaders.memory.slots import Lease, SlotPool

SHAPE = (4, 6)
NBYTES = 4 * 4 * 6


class Labelled(np.ndarray):
    """A user's subclass of ndarray."""


def typed_storage(tensor):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated, and still what much code calls
        return tensor.storage()


def with_autograd(tensor):
    """The loss of a model whose graph has saved the batch."""
    weight = torch.ones(SHAPE[1], requires_grad=True)
    return (tensor * weight).sum(), weight


def in_a_cycle(tensor):
    cycle = [tensor.numpy()]
    cycle.append(cycle)
    return cycle


ALIASES = {
    "row": lambda t: t[1],
    "slice": lambda t: t[1:3, ::2],
    "reshape": lambda t: t.reshape(-1),
    "permute": lambda t: t.permute(1, 0),
    "view(dtype)": lambda t: t.view(torch.int32),
    "as_strided": lambda t: torch.as_strided(t, (2, 2), (1, 1), 3),
    "detach": lambda t: t.detach(),
    ".data": lambda t: t.data,
    "Parameter": lambda t: torch.nn.Parameter(t),
    "set_": lambda t: torch.empty(0).set_(t),
    "expand": lambda t: t[:1].expand(3, -1),
    "untyped_storage": lambda t: t.untyped_storage(),
    "storage": typed_storage,
    ".numpy()": lambda t: t.numpy(),
    "row of .numpy()": lambda t: t.numpy()[1],
    "np.asarray": lambda t: np.asarray(t),
    "np.frombuffer": lambda t: np.frombuffer(t.numpy(), np.float32),
    "ndarray subclass": lambda t: t.numpy().view(Labelled),
    "ndarray of a subclass": lambda t: np.asarray(t.numpy().view(Labelled)),
    "as_strided array": lambda t: np.lib.stride_tricks.as_strided(t.numpy(), (2, 2), (4, 4)),
    "memoryview": lambda t: memoryview(t.numpy()),
    "part of a memoryview": lambda t: memoryview(t.numpy()).cast("B")[8:16],
    "ctypes": lambda t: np.ctypeslib.as_ctypes(t.numpy()),
    "PickleBuffer": lambda t: pickle.PickleBuffer(t.numpy()),
    "torch.from_numpy of .numpy()": lambda t: torch.from_numpy(t.numpy()),
    "torch.frombuffer": lambda t: torch.frombuffer(t.numpy(), dtype=torch.float32),
    "torch.from_dlpack": lambda t: torch.from_dlpack(t),
    "torch.from_dlpack of .numpy()": lambda t: torch.from_dlpack(t.numpy()),
    "np.from_dlpack": lambda t: np.from_dlpack(t),
    "np.from_dlpack of .numpy()": lambda t: np.from_dlpack(t.numpy()),
    "DLPack capsule": lambda t: t.__dlpack__(),
    "autograd": with_autograd,
    "reference cycle": in_a_cycle,
}


def read(alias) -> bytes:
    """The bytes that an alias shows, by its own means."""
    match alias:
        case torch.Tensor():
            return alias.detach().contiguous().view(torch.uint8).numpy().tobytes()
        case torch.UntypedStorage():
            return bytes(alias.tolist())
        case (torch.Tensor() as loss, weight):
            return torch.autograd.grad(loss, weight, retain_graph=True)[0].numpy().tobytes()
        case [np.ndarray() as array, _]:
            return array.tobytes()
        case np.ndarray() | memoryview():
            return alias.tobytes()
        case ctypes.Array() | pickle.PickleBuffer():
            return bytes(alias)
        case torch.storage.TypedStorage():
            return np.array(alias.tolist(), np.float32).tobytes()
    return read(torch.from_dlpack(alias))  # a capsule, which can be opened once


def content(seed: int) -> torch.Tensor:
    return torch.arange(24, dtype=torch.float32).reshape(SHAPE) + 100 * seed


# -- the pool alone


class NaivePool(SlotPool):
    """A pool whose leases hang on some object in the middle, as one would think of first."""

    def lease_on(self, anchor, block) -> None:
        block.become(BlockState.LEASED)
        lease = Lease(anchor, self._end)
        lease.block, lease.label, lease.since_s = block, "naive", 0.0
        lease.streams, lease.address = None, 0
        self._leases[block] = lease
        self.leased_nbytes += block.nbytes


def take(pool: SlotPool, seed: int, anchor: str = "root") -> torch.Tensor:
    """A batch as the loader makes it, over a lease that hangs on its root, or on the array or the tensor over it."""
    slot = pool.acquire([NBYTES])
    pool.finish(slot)
    if anchor == "root":
        [root] = pool.lease(slot, ["x"])
    else:
        root = (ctypes.c_char * NBYTES).from_buffer(pool.arena.buffer, slot[0].offset)
    rows = np.frombuffer(root, np.float32, 24).reshape(SHAPE)
    # The rows in use, as of any short batch. NumPy lets this view's `.base` pass by `rows`, which dies right here.
    tensor = torch.from_numpy(rows[: SHAPE[0]])
    if anchor == "array":
        pool.lease_on(rows, slot[0])
    elif anchor == "tensor":
        pool.lease_on(tensor, slot[0])
    tensor[:] = content(seed)
    return tensor


def shows_overwritten_bytes(name: str, anchor: str) -> bool:
    """Whether this alias, kept alone, is overwritten by the batches that follow."""
    pool = NaivePool(Arena(1 << 24, shared=False), ceiling_nbytes=1 << 24)
    tensor = take(pool, 1, anchor)
    address = tensor.data_ptr()
    alias = ALIASES[name](tensor)
    del tensor
    gc.collect()
    reused = False
    for seed in range(2, 6):
        reused |= take(pool, seed, anchor).data_ptr() == address
    pool.reclaim()
    assert pool.leased_count == (0 if reused else 1)
    overwritten = read(alias) != read(ALIASES[name](content(1)))
    assert overwritten == reused
    if not overwritten:
        del alias
        gc.collect()
        assert take(pool, 7, anchor).data_ptr() == address
    return overwritten


@pytest.mark.parametrize("name", ALIASES)
def test_no_alias_is_overwritten_while_it_lives_and_its_slot_is_used_again_when_it_dies(name):
    assert not shows_overwritten_bytes(name, "root")


# Each makes a new object over the same bytes that does not keep the tensor it was made from.
OUTLIVES_ITS_TENSOR = ["detach", ".data", "view(dtype)", ".numpy()", "np.asarray", "untyped_storage", "memoryview"]


@pytest.mark.parametrize("name", OUTLIVES_ITS_TENSOR)
def test_a_lease_that_hangs_on_the_tensor_lets_go_too_early(name):
    assert shows_overwritten_bytes(name, "tensor")


@pytest.mark.parametrize("name", ALIASES)
def test_a_lease_that_hangs_on_an_array_in_between_lets_go_too_early(name):
    assert shows_overwritten_bytes(name, "array")


# -- the real loader


class Numbers:
    """Rows of float32 that tell their index in every element, and the index."""

    def __init__(self, length=64):
        self.length = length

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        return np.full(6, index, np.float32), index


ENGINES = {
    "inline": {"num_workers": 0},
    "thread": {"num_workers": 2, "worker_method": "thread", "persistent_workers": True},
    "process": {"num_workers": 2, "multiprocessing_context": "fork", "persistent_workers": True},
}


@pytest.fixture(scope="module", params=ENGINES)
def loader(request):
    loader = DataLoader(Numbers(256), batch_size=4, **ENGINES[request.param])
    list(loader)  # the first batch of all is made before its spec is known
    gc.collect()
    return loader


def held(loader) -> int:
    gc.collect()
    inside.pool_of(loader).reclaim()
    return inside.pool_of(loader).leased_count


@pytest.mark.parametrize("name", ALIASES)
def test_an_alias_of_a_loaders_batch_stays_while_the_epoch_goes_on(loader, name):
    assert held(loader) == 0
    batches = iter(loader)
    for _ in range(4):
        rows, _ = next(batches)
    address = rows.data_ptr()
    expected = read(ALIASES[name](rows.clone()))
    alias = ALIASES[name](rows)
    del rows, _
    gc.collect()
    addresses = [rows.data_ptr() for rows, _ in batches]
    assert address not in addresses
    assert len(addresses) > len(set(addresses))  # slots were used again, but not this one
    assert read(alias) == expected
    del alias, batches
    assert held(loader) == 0


def test_a_copy_by_pickle_or_deepcopy_leaves_the_slot(loader):
    rows, labels = next(iter(loader))
    copies = [copy.deepcopy((rows, labels)), pickle.loads(pickle.dumps((rows, labels)))]
    del rows, labels
    assert held(loader) == 0
    list(loader)
    for rows, labels in copies:
        assert rows[:, 0].tolist() == labels.tolist() == [0, 1, 2, 3]


def test_a_batch_that_is_only_weakly_referenced_is_not_held(loader):
    rows, labels = next(iter(loader))
    seen = weakref.ref(rows)
    del rows, labels
    assert seen() is None
    assert held(loader) == 0


def test_share_memory_moves_the_tensor_out_of_its_slot(loader):
    rows, labels = next(iter(loader))
    address = rows.data_ptr()
    rows.share_memory_()
    assert rows.data_ptr() != address
    del labels
    assert held(loader) == 0
    list(loader)
    assert rows[:, 0].tolist() == [0, 1, 2, 3]


def answer_sums(tensors, sums, go_on):
    tensor = tensors.get()
    go_on.wait()
    sums.put(float(tensor.sum()))


@pytest.mark.skipif(sys.platform != "linux", reason="forks")
def test_a_tensor_sent_to_another_process_arrives_whole_and_leaves_its_slot():
    loader = DataLoader(Numbers(), batch_size=4, num_workers=2, multiprocessing_context="fork")
    context = torch.multiprocessing.get_context("fork")
    tensors, sums, go_on = context.Queue(), context.Queue(), context.Event()
    process = context.Process(target=answer_sums, args=(tensors, sums, go_on))
    process.start()
    batches = iter(loader)
    next(batches)
    rows, labels = next(batches)
    tensors.put(rows)
    del rows, labels
    assert len(list(batches)) == 14  # every slot is written again before the other process looks
    go_on.set()
    assert sums.get(timeout=30) == 6 * (4 + 5 + 6 + 7)
    process.join()
    tensors.close()
    tensors.join_thread()
    assert held(loader) == 0


def test_a_lease_that_ends_on_another_thread_frees_its_slot(loader):
    box = list(next(iter(loader)))
    thread = threading.Thread(target=box.clear)
    thread.start()
    thread.join()
    assert held(loader) == 0


def test_a_lease_collected_on_another_thread_while_the_loader_runs_frees_its_slot(loader):
    """Cycles that hold batches are collected on a thread of their own, while this one makes further batches."""
    stop = threading.Event()

    def collect():
        while not stop.is_set():
            gc.collect()

    thread = threading.Thread(target=collect)
    thread.start()
    gc.disable()
    try:
        for _ in range(6):
            for rows, labels in loader:
                assert (rows[:, 0] == labels).all()
                in_a_cycle(rows)
    finally:
        gc.enable()
        stop.set()
        thread.join()
    del rows, labels
    assert held(loader) == 0


AT_EXIT = """
    import threading, time
    import numpy as np
    import torch
    from loaders import DataLoader

    class Numbers:
        def __len__(self):
            return 64
        def __getitem__(self, index):
            return np.full(6, index, np.float32), index

    workers = {"num_workers": 2, "multiprocessing_context": "fork"}
    threads = {"num_workers": 2, "worker_method": "thread"}
    kept, half_way = [], []
    engines = [{"num_workers": 0}, workers, threads]
    for options in [*engines, *({**workers, "persistent_workers": True} for workers in engines[1:])]:
        loader = DataLoader(Numbers(), batch_size=4, **options)
        rows, labels = next(iter(loader))
        kept += [rows, rows.numpy(), memoryview(rows.numpy()), rows.__dlpack__(), labels, loader]
        half_way.append(iter(loader))
        next(half_way[-1])
    cycle = [kept, half_way]
    cycle.append(cycle)
    weight = torch.ones(6, requires_grad=True)
    graph = (rows * weight).sum()
    threading.Thread(target=lambda held: time.sleep(1000), args=(rows,), daemon=True).start()
    del loader
"""


def test_the_interpreter_exits_in_silence_while_batches_and_iterators_live():
    command = [sys.executable, "-X", "dev", "-W", "error", "-c", textwrap.dedent(AT_EXIT)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=100, env=os.environ | {"PYTHONPATH": os.getcwd()}
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
