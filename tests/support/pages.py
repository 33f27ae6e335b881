"""The pages of the documentation, and the code in them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
PAGES = {
    str(path.relative_to(ROOT)): path
    for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md")))
}
# A declaration, an opening fence with its language, the code, and the same fence again; maybe indented.
_BLOCK = re.compile(
    r"(?:<!-- not run: (?P<reason>[^\n]+?) -->\n)?^(?P<indent> *)(?P<fence>`{3,})(?P<language>[^\n]*)\n"
    r"(?P<code>.*?)^(?P=indent)(?P=fence)$",
    re.DOTALL | re.MULTILINE,
)


class Block(NamedTuple):
    """A fenced block of a page.

    Attributes:
        language: the word behind the fence, "" without one.
        reason: why the block is not run; None where it is.
        line: where its code begins in the page, from 1.
    """

    language: str
    code: str
    reason: str | None
    line: int


def blocks_of(page: str) -> list[Block]:
    """All fenced blocks of a page, named as in `PAGES`."""
    text = PAGES[page].read_text(encoding="utf-8")
    return [
        Block(
            found["language"].strip(),
            re.sub(f"^{found['indent']}", "", found["code"], flags=re.MULTILINE),
            found["reason"],
            text.count("\n", 0, found.start("code")) + 1,
        )
        for found in _BLOCK.finditer(text)
    ]


def run_page(page: str) -> dict[str, object]:
    """Run the Python blocks of a page in order, as one program in the current folder; what they leave.

    Lines of a traceback are those of the page.
    """
    names: dict[str, object] = {"__name__": "__main__"}
    for block in blocks_of(page):
        if block.language == "python" and block.reason is None:
            exec(compile("\n" * (block.line - 1) + block.code, str(PAGES[page]), "exec"), names)
    return names
