"""The pages of the documentation, and the code in them."""

from __future__ import annotations

import io
import re
import sys
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[2]
PAGES = {
    str(path.relative_to(ROOT)): path
    for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md")))
}
# Maybe a reason not to run it; an opening fence with its language, the code, and the same fence; maybe indented.
_BLOCK = re.compile(
    r"(?:<!-- not run: (?P<reason>[^\n]+?) -->\n)?^(?P<indent> *)(?P<fence>`{3,})(?P<language>[^\n]*)\n"
    r"(?P<code>.*?)^(?P=indent)(?P=fence)$",
    re.DOTALL | re.MULTILINE,
)


class Block(NamedTuple):
    """A fenced block of a page.

    Attributes:
        language: the word after the opening fence, "" if there is none.
        reason: why the block is not run; None if it is run.
        line: the line of the page where its code begins, from 1.
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
    """Run the Python blocks of a page in order, as one program in the current folder. Returns its global variables.

    A `print(...)` whose line ends with a comment must print what that says. Tracebacks have the page's line numbers.
    """
    names: dict[str, object] = {"__name__": "__main__"}
    file = str(PAGES[page])
    for block in blocks_of(page):
        if block.language == "python" and block.reason is None:
            names["print"] = _Checked(file, block)
            exec(compile("\n" * (block.line - 1) + block.code, file, "exec"), names)
    return names


class _Checked:
    """`print` that checks its output against its line's comment: "…" is any text, and ": " or ", " may add a remark."""

    def __init__(self, file: str, block: Block) -> None:
        self._file = file
        self._block = block

    def __call__(self, *values: object, **options: Any) -> None:
        print(*values, **options)
        caller = sys._getframe(1)
        if caller.f_code.co_filename != self._file:
            return
        line = self._block.code.splitlines()[caller.f_lineno - self._block.line]
        claim = re.fullmatch(r" *print\(.*\)  # (.*)", line)
        if claim is not None and "file" not in options:
            told = io.StringIO()
            print(*values, **{**options, "file": told})
            pattern = re.escape(claim[1]).replace("…", ".*")
            printed = told.getvalue().strip()
            is_true = re.fullmatch(pattern, printed, re.DOTALL) or claim[1].startswith((f"{printed}: ", f"{printed}, "))
            assert is_true, f"{self._file}:{caller.f_lineno}: printed {printed!r}, its comment says {claim[1]!r}"
