"""What samples draw from the process's own generators is theirs, too, and the process does not notice."""

from __future__ import annotations

import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import albumentations as A
import numpy as np
import pytest
import torch
from torch.utils.data import IterableDataset

from loaders import DataLoader, sample_rng
from loaders.randomness.process_generators import ProcessGenerators

N = 40
PROCESSES: dict[str, dict[str, Any]] = {
    "inline": {"num_workers": 0},
    "1 process": {"num_workers": 1, "multiprocessing_context": "fork"},
    "2 processes": {"num_workers": 2, "multiprocessing_context": "fork"},
    "2 that persist": {"num_workers": 2, "multiprocessing_context": "fork", "persistent_workers": True},
}
THREADS: dict[str, dict[str, Any]] = {"2 threads": {"num_workers": 2, "worker_method": "thread"}}

DRAWS: dict[str, Callable[[int], Any]] = {
    "random": lambda index: random.random(),
    "random, a gaussian": lambda index: random.gauss(0, 1),
    "numpy": lambda index: np.random.rand(),
    "numpy, one gaussian": lambda index: np.random.randn(),
    "torch": lambda index: torch.rand(()).item(),
    "torch, one gaussian": lambda index: torch.randn(()).item(),
    "all": lambda index: random.random() + np.random.rand() + torch.rand(()).item(),
    "sample 37 alone": lambda index: np.random.randn() + random.random() if index == 37 else 0.0,
    "a whole twister": lambda index: float(np.random.randint(0, 2**32, 624, np.uint32).sum()),
    "a shuffle": lambda index: float(random.sample(range(1000), 5)[0]),
    "its own seed": lambda index: (random.seed(index), random.random())[1] + np.random.rand(),  # type: ignore[func-returns-value]
}
KEYED: dict[str, Callable[[int], Any]] = {
    "sample_rng": lambda index: sample_rng().random(),
    "sample_rng twice": lambda index: sample_rng().random() + 2 * sample_rng().random(),
}


class Draws:
    def __init__(self, draw: Callable[[int], Any], bad: tuple[int, ...] = ()) -> None:
        self.draw = draw
        self.bad = bad

    def __len__(self) -> int:
        return N

    def __getitem__(self, index: int) -> dict[str, Any]:
        drawn = self.draw(index)
        if index in self.bad:
            raise ValueError("unreadable")
        return {"index": index, "drawn": drawn}


class DrawsTogether(Draws):
    def __getitems__(self, indices: list[int]) -> list[dict[str, Any]]:
        return [self[index] for index in indices]


class Augments:
    def __init__(self) -> None:
        self.transform = A.Compose([A.RandomCrop(8, 8), A.HorizontalFlip(p=0.5), A.GaussNoise(p=1.0)])

    def __len__(self) -> int:
        return N

    def __getitem__(self, index: int) -> Any:
        return self.transform(image=np.full((16, 16, 3), index, np.uint8))["image"]


class Stream(IterableDataset[Any]):
    def __init__(self, draw: Callable[[int], Any]) -> None:
        self.draw = draw

    def __iter__(self) -> Iterator[Any]:
        return ({"index": index, "drawn": self.draw(index)} for index in range(N))


def scramble(number: int) -> None:
    """The state that the process happens to be in: with a normal number in store in each of its generators."""
    random.seed(number)
    random.gauss(0, 1)
    np.random.seed(number)
    np.random.randn()
    torch.manual_seed(number)
    torch.randn(())


def states() -> list[Any]:
    return [str(random.getstate()), str(np.random.get_state()), torch.get_rng_state().tolist()]


def epochs(dataset: Any, scrambled: int = 0, **arguments: Any) -> list[Any]:
    scramble(scrambled)
    loader = DataLoader(dataset, **{"batch_size": 8, "shuffle": True, "seed": 5, **arguments})
    return [[torch.utils.data.default_convert(batch) for batch in loader] for _ in range(2)]


def assert_equal(one: list[Any], other: list[Any]) -> None:
    assert str(one) == str(other)


@pytest.fixture(autouse=True)
def _exact() -> Iterator[None]:
    torch.set_printoptions(precision=17, threshold=10**9)
    yield
    torch.set_printoptions(profile="default")


@pytest.mark.parametrize("parallel", PROCESSES.values(), ids=PROCESSES)
@pytest.mark.parametrize("draw", {**DRAWS, **KEYED}.values(), ids={**DRAWS, **KEYED})
def test_what_a_sample_draws_is_its_own_whoever_reads_it(draw: Callable[[int], Any], parallel: dict[str, Any]) -> None:
    reference = epochs(Draws(draw), shuffle=False, scrambled=1)
    assert_equal(epochs(Draws(draw), shuffle=False, scrambled=2, **parallel), reference)
    values = torch.cat([batch["drawn"] for epoch in reference for batch in epoch])
    if draw is DRAWS["sample 37 alone"]:
        assert len(set(values.tolist())) == 3
    elif draw is not DRAWS["a shuffle"]:
        assert len(set(values.tolist())) == 2 * N


@pytest.mark.parametrize("draw", KEYED.values(), ids=KEYED)
def test_threads_draw_the_same_from_what_is_keyed(draw: Callable[[int], Any]) -> None:
    assert_equal(epochs(Draws(draw), **THREADS["2 threads"]), epochs(Draws(draw)))


@pytest.mark.parametrize("parallel", [*PROCESSES.values(), *THREADS.values()], ids=[*PROCESSES, *THREADS])
def test_an_albumentations_pipeline_draws_the_same_everywhere(parallel: dict[str, Any]) -> None:
    reference = epochs(Augments(), scrambled=1)
    assert_equal(epochs(Augments(), scrambled=2, **parallel), reference)
    assert str(reference[0]) != str(reference[1])


@pytest.mark.parametrize("parallel", PROCESSES.values(), ids=PROCESSES)
@pytest.mark.parametrize("kind", ["substitute", "skip"])
def test_samples_behind_a_failed_one_draw_from_their_own_keys(kind: str, parallel: dict[str, Any]) -> None:
    bad = (3, 4, 17, 39)
    reference = epochs(Draws(DRAWS["all"], bad), on_error=kind, scrambled=1)
    assert_equal(epochs(Draws(DRAWS["all"], bad), on_error=kind, scrambled=2, **parallel), reference)


@pytest.mark.parametrize("parallel", PROCESSES.values(), ids=PROCESSES)
@pytest.mark.parametrize("draw", [DRAWS["all"], DRAWS["sample 37 alone"], KEYED["sample_rng"]])
def test_batches_that_are_read_at_once_draw_the_same(draw: Callable[[int], Any], parallel: dict[str, Any]) -> None:
    assert_equal(epochs(DrawsTogether(draw), scrambled=2, **parallel), epochs(DrawsTogether(draw), scrambled=1))


@pytest.mark.parametrize("draw", [DRAWS["all"], DRAWS["numpy, one gaussian"], KEYED["sample_rng"]])
def test_a_stream_draws_the_same_with_the_same_number_of_workers(draw: Callable[[int], Any]) -> None:
    one = epochs(Stream(draw), shuffle=False, scrambled=1)
    assert_equal(epochs(Stream(draw), shuffle=False, scrambled=2), one)
    assert_equal(epochs(Stream(draw), shuffle=False, scrambled=3, **PROCESSES["1 process"]), one)
    two = epochs(Stream(draw), shuffle=False, scrambled=1, **PROCESSES["2 processes"])
    assert_equal(epochs(Stream(draw), shuffle=False, scrambled=2, **PROCESSES["2 that persist"]), two)
    values = torch.cat([batch["drawn"] for epoch in two for batch in epoch])
    assert len(set(values.tolist())) == 4 * N  # two workers, two epochs


def collate(samples: list[dict[str, Any]]) -> Any:
    drawn = [sample["drawn"] for sample in samples]
    return torch.tensor([*drawn, sample_rng().random(), random.random(), np.random.randn(), torch.rand(()).item()])


def collate_keyed(samples: list[dict[str, Any]]) -> Any:
    return torch.tensor([sample["drawn"] for sample in samples] + [sample_rng().random()])


@pytest.mark.parametrize("parallel", PROCESSES.values(), ids=PROCESSES)
@pytest.mark.parametrize("draw", [lambda index: float(index), DRAWS["all"]], ids=["still samples", "drawing samples"])
def test_a_collate_fn_draws_from_its_own_key(draw: Callable[[int], Any], parallel: dict[str, Any]) -> None:
    reference = epochs(Draws(draw), collate_fn=collate, shuffle=False, scrambled=1)
    assert_equal(epochs(Draws(draw), collate_fn=collate, shuffle=False, scrambled=2, **parallel), reference)
    own = torch.stack([batch[8:] for epoch in reference for batch in epoch])
    assert len(set(own.flatten().tolist())) == own.numel()
    assert not set(own.flatten().tolist()) & set(torch.cat([b[:8] for e in reference for b in e]).tolist())


def test_a_collate_fn_in_a_thread_draws_from_its_own_key() -> None:
    made = {"collate_fn": collate_keyed}
    assert_equal(
        epochs(Draws(KEYED["sample_rng"]), **made, **THREADS["2 threads"]), epochs(Draws(KEYED["sample_rng"]), **made)
    )


# -- the process itself


SAMPLES = {**DRAWS, **KEYED, "nothing": lambda index: 0.0}


@pytest.mark.parametrize("kind", [Draws, DrawsTogether, Stream], ids=["each", "together", "stream"])
@pytest.mark.parametrize("draw", SAMPLES.values(), ids=SAMPLES)
def test_without_workers_the_process_is_undisturbed_by_every_next(kind: Any, draw: Callable[[int], Any]) -> None:
    scramble(3)
    iterator = iter(DataLoader(kind(draw), 8, seed=5))
    for number in range(N // 8):
        scramble(number)
        before = states()
        next(iterator)
        assert states() == before
        assert np.random.randn() == np.random.RandomState(number).randn(2)[1]  # the one in store
    before = states()
    assert next(iterator, None) is None
    assert states() == before


def test_without_workers_the_process_is_undisturbed_by_a_sample_that_fails() -> None:
    iterator = iter(DataLoader(Draws(DRAWS["all"], bad=(9,)), 8, seed=5))
    next(iterator)
    before = states()
    with pytest.raises(ValueError, match="unreadable"):
        next(iterator)
    assert states() == before


def test_only_what_draws_is_keyed() -> None:
    still, drawing = ProcessGenerators(shared=False, keyed=False), ProcessGenerators(shared=False, keyed=False)
    still.begin()
    assert not still.drew()
    drawing.begin()
    np.random.randn()
    assert drawing.drew()
    drawing.begin()
    assert not drawing.drew()
    assert (still.keyed, drawing.keyed) == (False, True)


LATE = """
import sys
from loaders.randomness.process_generators import ProcessGenerators
from loaders.randomness.streams import Domain
generators = ProcessGenerators(shared=False, keyed=False)
generators.begin()
assert "torch" not in sys.modules
import torch
assert not generators.drew(), "an import is no draw"
generators.begin()
torch.rand(())
assert generators.drew()
drawn = []
for _ in range(2):
    generators.enter(Domain.PROCESS, 5, 0, 7)
    drawn.append(torch.rand(()).item())
print(*drawn, sep="\\n")
"""


def test_a_torch_that_is_imported_late_is_keyed_from_then_on() -> None:

    root = Path(__file__).parents[3]
    done = subprocess.run([sys.executable, "-c", LATE], cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    one, other = done.stdout.split()
    assert one == other


@pytest.mark.parametrize("change", ["python", "numpy", "torch", "a cached normal number"])
def test_what_the_caller_draws_between_two_batches_is_there_after_a_sample_draws(change):
    """The states of the caller's generators are not read again for every batch, only where they have changed."""

    class DrawsLate:
        def __len__(self):
            return 8

        def __getitem__(self, index):
            return random.random() + np.random.normal() + torch.rand(()).item() if index == 7 else 0.0

    batches = iter(DataLoader(DrawsLate(), 1, seed=1))
    for _ in range(4):
        next(batches)
    if change == "python":
        random.random()
    elif change == "torch":
        torch.rand(())
    else:
        np.random.normal(size=2 if change == "numpy" else 1)
    states = random.getstate(), np.random.get_state(legacy=False), torch.get_rng_state()
    for _ in batches:
        pass
    assert random.getstate() == states[0]
    assert repr(np.random.get_state(legacy=False)) == repr(states[1])
    assert torch.equal(torch.get_rng_state(), states[2])
