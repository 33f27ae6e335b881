"""Which shards a pattern stands for."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from braceexpand import braceexpand  # what WebDataset uses
from hypothesis import given, settings
from hypothesis import strategies as st

from loaders import DatasetError
from loaders.datasets.tar.names import expand_braces, shard_paths


@pytest.mark.parametrize(
    "pattern",
    [
        "plain.tar",
        "s-{000..003}.tar",
        "{8..11}",
        "{08..11}",
        "{3..1}",
        "{0..9..3}",
        "{a,b}-{0..1}.tar",
        "{a,{b,c}{1..2}}x",
        "{,a}b",
        "x{}y",
        "{a}",
        "a}b{c",
        "{-1..1}",
        "{a{1..2}}",
    ],
)
def test_braces_mean_what_they_mean_in_a_shell(pattern):
    assert list(expand_braces(pattern)) == list(braceexpand(pattern))


def test_braces_that_are_not_closed_are_letters():
    assert [list(expand_braces(pattern)) for pattern in ("{a..b", "{a,b", "a}b{c")] == [["{a..b"], ["{a,b"], ["a}b{c"]]


@settings(max_examples=200, derandomize=True, deadline=None, database=None)
@given(st.lists(st.sampled_from(["a", "{", "}", ",", "{0..2}", "{08..10}", "{b,c}"]), max_size=8).map("".join))
def test_any_pattern_ends_with_some_shards(pattern):
    assert len(list(expand_braces(pattern))) >= 1


def test_wildcards_give_the_files_there_are_by_name(tmp_path):
    for name in ("b.tar", "a.tar", "c.txt", "x{1,2}.tar", "y[1].tar"):
        (tmp_path / name).touch()
    found = shard_paths([tmp_path / "*.tar"])
    assert [os.path.basename(path) for path in found] == ["a.tar", "b.tar", "x{1,2}.tar", "y[1].tar"]
    # What exists under the very name is meant.
    assert shard_paths(str(tmp_path / "x{1,2}.tar")) == [str(tmp_path / "x{1,2}.tar")]
    assert shard_paths(str(tmp_path / "y[1].tar")) == [str(tmp_path / "y[1].tar")]
    assert shard_paths(Path(each) for each in ("q.tar", "p.tar")) == ["q.tar", "p.tar"]


def test_shards_that_cannot_be_meant_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("loaders.datasets.tar.names._MOST", 1000)
    with pytest.raises(DatasetError, match="no file matches"):
        shard_paths(str(tmp_path / "*.tar"))
    with pytest.raises(DatasetError, match=r'"nonsense://\*.tar" cannot be listed: '):
        shard_paths("nonsense://*.tar")
    with pytest.raises(DatasetError, match=r"a.tar is listed more than once"):
        shard_paths(["a.tar", "{b,a}.tar"])
    with pytest.raises(DatasetError, match="none in the list"):
        shard_paths([])
    with pytest.raises(DatasetError, match="makes more than 1,000 shards"):
        shard_paths("{0..99999999999}.tar")
    with pytest.raises(TypeError, match="is not a str"):
        shard_paths([b"a.tar"])
