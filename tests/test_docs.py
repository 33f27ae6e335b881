"""The documentation is true: its code runs, its links lead somewhere, every public name and every page can be found."""

from __future__ import annotations

import inspect
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from support.pages import PAGES, ROOT, blocks_of, run_page

import loaders
from loaders import DevicePrefetcher, as_array, as_tensor, numpy_collate, shares_memory, to_image, to_numpy
from loaders.errors import ShareError

if sys.version_info >= (3, 11):
    import tomllib

# Blocks in these are shown, never run.
SHOWN = {"sh", "text"}
DOCUMENTS = [page for page in PAGES if page.startswith("docs/")]


@pytest.mark.parametrize("page", [page for page in PAGES if any(b.language == "python" for b in blocks_of(page))])
def test_the_code_of_a_page_runs_from_top_to_bottom(page, few_photos, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if PAGES[page].read_text(encoding="utf-8").startswith("<!-- test: photos -->"):
        Path("photos").symlink_to(few_photos)
    run_page(page)


@pytest.mark.parametrize("page", PAGES)
def test_every_block_says_whether_it_runs(page):
    for block in blocks_of(page):
        assert block.language in SHOWN | {"python"}, f"{page}:{block.line}: a block of {block.language!r}"
        assert block.reason is None or block.language == "python", f"{page}:{block.line}"
    fences = re.findall(r"^ *`{3,}", PAGES[page].read_text(encoding="utf-8"), re.MULTILINE)
    assert len(fences) == 2 * len(blocks_of(page)), f"{page}: a block that is not closed"


@pytest.mark.parametrize("page", [*PAGES, "CHANGELOG.md", "benchmarks/README.md"])
def test_every_link_leads_to_a_file_and_a_heading(page):
    path = ROOT / page
    for target in re.findall(r"\]\(([^)\s]+)\)", path.read_text(encoding="utf-8")):
        if re.match(r"[a-z]+:", target):
            continue
        file, _, anchor = target.partition("#")
        found = path.parent / file if file else path
        assert found.exists(), f"{page}: {target}"
        if page.startswith("docs/"):
            assert (ROOT / "docs") in found.resolve().parents, f"{page}: {target} is no part of the site"
        if anchor:
            headings = re.findall(r"^#+ (.*)$", found.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in map(_anchor, headings), f"{page}: {target}"


@pytest.mark.parametrize("page", ["CONTRIBUTING.md", "docs/design.md", "docs/benchmarks.md", "docs/dependencies.md"])
def test_every_path_that_is_named_exists(page):
    named = re.findall(r"`(\w+/[\w./]*)`", PAGES[page].read_text(encoding="utf-8"))
    assert named
    # The map of the code names modules below loaders/, without their endings.
    for path in set(named) - {"site/", "photos/train", "photos/val"}:
        assert any((ROOT / folder / f"{path}{end}").exists() for folder in ("", "loaders") for end in ("", ".py")), path


def _anchor(heading: str) -> str:
    """As Python-Markdown and GitHub make it, for headings that both treat alike."""
    return re.sub(r"[\s]+", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower())


def test_every_page_is_in_the_navigation_once():
    settings = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    in_navigation = re.findall(r"^ +- [^\n]*: (\S+\.md)$", settings, re.MULTILINE)
    assert sorted(f"docs/{page}" for page in in_navigation) == sorted(DOCUMENTS)
    assert in_navigation[0] == "index.md"


def test_every_public_name_is_in_the_reference_once():
    entries = re.findall(r"^::: (\S+)$", (ROOT / "docs/reference.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert len(entries) == len(set(entries))
    exported = {f"loaders.{name}" for name in loaders.__all__ if name != "__version__"}
    assert exported - set(entries) == set()
    # All others are public, too, where they are defined.
    for entry in set(entries) - exported:
        module, _, name = entry.rpartition(".")
        assert module in ("loaders.errors", "loaders.benchmark", "loaders.doctor"), entry
        __import__(module)
        assert name in getattr(sys.modules[module], "__all__", dir(sys.modules[module])), entry


def test_every_error_is_in_the_reference():
    entries = re.findall(r"^::: loaders\.(?:errors\.)?(\w+Error)$", PAGES["docs/reference.md"].read_text("utf-8"), re.M)
    tree = re.findall(r"^[ │├└─]+(\w+Error)\b", loaders.errors.__doc__ or "", re.MULTILINE)
    assert sorted(entries) == sorted(set(tree) - {"SlotStateError"})  # which no program should catch


def test_every_argument_and_method_of_the_loader_is_compared_with_torchs():
    page = PAGES["docs/from_torch.md"].read_text(encoding="utf-8")
    named = set(re.findall(r"`(\w+)`", page))
    assert set(inspect.signature(loaders.DataLoader.__init__).parameters) - {"self"} <= named
    assert {name for name in vars(loaders.DataLoader) if not name.startswith("_")} <= named


def test_every_environment_variable_of_ours_is_named_on_a_page():
    pages = "".join(PAGES[page].read_text(encoding="utf-8") for page in DOCUMENTS)
    source = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "loaders").rglob("*.py"))
    assert set(re.findall(r"\bLOADERS_[A-Z]+\b", source)) == set(re.findall(r"\bLOADERS_[A-Z]+\b", pages))


@pytest.mark.skipif(sys.version_info < (3, 11), reason="tomllib came with Python 3.11")
def test_every_dependency_is_explained():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    groups = [project["dependencies"], *project["optional-dependencies"].values()]
    explained = re.findall(r"^\| (\S+) ≥ (\S+) \|", PAGES["docs/dependencies.md"].read_text("utf-8"), re.MULTILINE)
    assert {f"{name}>={version}" for name, version in explained} == {
        line.partition(";")[0] for group in groups for line in group if not line.startswith("loaders[")
    }


def test_the_table_of_memory_is_right_about_conversions():
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    tensor = torch.arange(6.0)
    assert shares_memory(array, as_tensor(array))
    assert shares_memory(tensor, as_array(tensor))
    assert not shares_memory(array[::-1], as_tensor(array[::-1]))
    with pytest.raises(ShareError, match="negative strides"):
        as_tensor(array[::-1], copy=False)
    assert not shares_memory(array, as_tensor(array, copy=True))
    assert not shares_memory(tensor, as_array(tensor, copy=True))
    weights = torch.zeros(3, requires_grad=True)
    assert shares_memory(weights, as_array(weights))
    assert not as_array(weights).flags.writeable


def test_the_table_of_memory_is_right_about_copies_you_own():
    tensor = torch.zeros(3)
    assert not shares_memory(tensor, to_numpy({"boxes": [tensor]})["boxes"][0])
    pixels = torch.zeros((3, 4, 4), dtype=torch.uint8)
    assert not shares_memory(pixels, to_image(pixels))
    assert to_image(torch.zeros(3, 4, 5)).shape == (4, 5, 3)


def test_the_table_of_memory_is_right_about_batches():
    rows = [np.full(3, row, np.float32) for row in range(2)]
    batch = numpy_collate([{"row": row} for row in rows])
    assert not any(shares_memory(row, batch["row"]) for row in rows)
    (same,) = DevicePrefetcher([batch], "cpu")
    assert same is batch
