"""The loaders that a comparison measures: a setup says which, `make` creates it over a dataset."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

# The arguments copied from a loader to others like it.
_KEPT = ("batch_size", "collate_fn", "drop_last", "timeout", "worker_init_fn", "multiprocessing_context", "pin_memory")
_KEPT_WITH_WORKERS = ("prefetch_factor", "persistent_workers")


@dataclass(frozen=True)
class Setup:
    """One of the loaders to measure.

    Attributes:
        whose: "ours", "torch", or "as it is" for the target's own loader.
        workers: 0 reads in the consumer's own thread.
        method: of ours; torch's has only processes.
    """

    whose: Literal["ours", "torch", "as it is"]
    workers: int = 0
    method: Literal["process", "thread"] = "process"

    @property
    def name(self) -> str:
        """For tables."""
        if self.whose == "as it is":
            return "the loader, as it is"
        whose = "loaders" if self.whose == "ours" else "torch"
        if self.workers == 0:
            return f"{whose}, no workers"
        kind = "process" if self.method == "process" else "thread"
        return f"{whose}, {self.workers} {kind}{'' if self.workers == 1 else 'es' if kind == 'process' else 's'}"

    def make(self, target: Any, indices: Sequence[int] | None, batch_size: int, dataset: Any = None) -> Any:
        """The loader over a dataset, or one like the loader that was given.

        Args:
            target: a dataset, or a loader whose dataset and arguments are taken.
            indices: the samples of an epoch; None leaves the order to the loader, as streams require.
            batch_size: used if the target is a dataset.
            dataset: read in place of the target's.
        """
        if self.whose == "as it is":
            if dataset is None:
                return target
            like = Setup("ours", target.num_workers, getattr(target, "worker_method", "process"))
            return like.make(target, indices, batch_size, dataset)
        arguments: dict[str, Any] = {"batch_size": batch_size}
        is_loader = hasattr(target, "batch_sampler")
        dataset = dataset if dataset is not None else target.dataset if is_loader else target
        if is_loader:
            arguments = {name: getattr(target, name) for name in _KEPT}
            if self.workers > 0 and target.num_workers > 0:
                arguments |= {name: getattr(target, name) for name in _KEPT_WITH_WORKERS}
                # If it was not given, our loader's attribute is torch's default, which our loader does not accept.
                arguments["prefetch_factor"] = getattr(target, "_depth", target.prefetch_factor)
            if self.workers == 0:
                arguments |= {"timeout": 0, "multiprocessing_context": None}
            if arguments["batch_size"] is None and target.batch_sampler is not None:
                arguments["batch_size"] = batch_size
        if indices is not None:
            arguments["sampler"] = indices
        if self.whose == "torch":
            import torch.utils.data

            return torch.utils.data.DataLoader(dataset, num_workers=self.workers, **arguments)
        from loaders.dataloader.loader import DataLoader

        fields = getattr(target, "fields", None) if is_loader else None
        return DataLoader(
            dataset, num_workers=self.workers, worker_method=self.method, seed=0, fields=fields, **arguments
        )


def setups(
    workers: Sequence[int], methods: Sequence[Literal["process", "thread"]], versus: bool, as_it_is: bool
) -> list[Setup]:
    """All requested setups, each once: the loader that was given first, then ours, each with torch's."""
    found: list[Setup] = [Setup("as it is")] if as_it_is else []
    for count in workers:
        found.extend(Setup("ours", count, method) for method in (methods if count else methods[:1]))
        if versus:
            found.append(Setup("torch", count))
    return list(dict.fromkeys(found))


def spread_indices(length: int, count: int) -> list[int]:
    """`count` indices over the whole dataset, in a fixed shuffled order; some repeat if it has fewer samples."""
    rng = np.random.default_rng(0)
    whole, rest = divmod(count, length)
    parts = [rng.permutation(length) for _ in range(whole)]
    parts.append(rng.choice(length, rest, replace=False))
    return [int(index) for index in np.concatenate(parts)]
