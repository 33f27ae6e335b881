"""The documentation is true: its code runs, its links lead somewhere, every public name and every page can be found."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import yaml
from support.pages import PAGES, ROOT, blocks_of, run_page

import loaders

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


def _anchor(heading: str) -> str:
    """As Python-Markdown and GitHub make it, for headings that both treat alike."""
    return re.sub(r"[\s]+", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower())


def test_every_page_is_in_the_navigation_once():
    settings = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    in_navigation = re.findall(r"^ +- [^\n]*: (\S+\.md)$", settings, re.MULTILINE)
    assert sorted(f"docs/{page}" for page in in_navigation) == DOCUMENTS
    assert yaml.safe_load(settings)["nav"][0] == {"Start": "index.md"}


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


@pytest.mark.skipif(sys.version_info < (3, 11), reason="tomllib came with Python 3.11")
def test_every_dependency_is_explained():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    groups = [project["dependencies"], *project["optional-dependencies"].values()]
    explained = re.findall(r"^\| (\S+) ≥ (\S+) \|", PAGES["docs/dependencies.md"].read_text("utf-8"), re.MULTILINE)
    assert {f"{name}>={version}" for name, version in explained} == {
        line.partition(";")[0] for group in groups for line in group if not line.startswith("loaders[")
    }
