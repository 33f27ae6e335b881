"""The benchmark of tar shards, on few and small ones: every peer runs, and the section says what was measured."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks import harness, tar


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    found = tmp_path_factory.mktemp("shards")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tar, "_MEMBERS", 20)
        tar.write_photos(found, count=8, per_shard=3)
        tar.write_tiny(found, shards=4)
    return found


# WebDataset says that its shards are fewer than its workers, and what it would set elsewhere.
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("peer", tar.PEERS)
def test_every_peer_runs(folder, peer, monkeypatch):
    monkeypatch.setattr(tar, "BATCH", 2)
    monkeypatch.setattr(tar, "WORKERS", 1)
    threads = torch.get_num_threads()
    try:
        assert tar.train(peer, str(folder), epochs=1)["per_s"] > 0
    finally:
        torch.set_num_threads(threads)


@pytest.mark.filterwarnings("ignore:This DataLoader will create 4 worker processes")
def test_the_section_is_made_of_what_was_measured(folder, monkeypatch):
    monkeypatch.setattr(tar, "BATCH", 4)
    fast = {"per_s": 200.0}
    content = {
        "train": {peer: [{"per_s": 100.0}] if peer == "webdataset" else [fast] for peer in tar.PEERS},
        "first_batch": [tar.first_batch(str(folder))],
        "scanning": [tar.scanning(str(folder))],
        "memory": {f"{p} {w}": [tar.memory(str(folder), p, w)] for p, w in (("00000", 1), ("*", 1), ("*", 4))},
    }
    content |= {"shards": 4, "rounds": 1, "source": "photographs", "machine": harness.machine()}
    text = tar.section(json.loads(json.dumps(content)))
    assert "| ours, shards, random order | 200 (200 to 200) | 1.00 (1.00 to 1.00) | 2.00 (2.00 to 2.00) |" in text
    assert "80 samples: the first batch" in text
