"""The benchmark of tables, on few rows: all peers run."""

from __future__ import annotations

import pytest
import torch

from benchmarks import tables_of_arrow


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    found = tmp_path_factory.mktemp("tables")
    tables_of_arrow.write_tables(found, photos=24, rows=400)
    return found


@pytest.mark.parametrize(
    ("work", "peer"), [(work, peer) for work, peers in tables_of_arrow.PEERS.items() for peer in peers]
)
def test_every_peer_runs(folder, work, peer):
    threads = torch.get_num_threads()
    try:
        figures = tables_of_arrow.through_loader(peer, work, str(folder), workers=0, seconds=0.01, batch_size=2)
    finally:
        torch.set_num_threads(threads)
    assert figures["samples_per_s"] > 0
