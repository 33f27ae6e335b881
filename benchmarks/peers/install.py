"""Creates the environments of peers: `python -m benchmarks.peers.install grain_loader`, or `all`.

An environment is in `.peers/PEER` and is recreated when the pinned versions change. Our loader and torch's need none.
"""

from __future__ import annotations

import importlib
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.peers import PEERS

ROOT = Path(__file__).parents[2]
ENVIRONMENTS = ROOT / ".peers"


def python_of(peer: str) -> str | None:
    """The Python that runs a peer; None if its environment has not been created, or cannot be."""
    module = importlib.import_module(f"benchmarks.peers.{peer}")
    if hasattr(module, "WHY_NOT"):
        return None
    if not module.REQUIREMENTS:
        return sys.executable
    made = _mark(peer)
    return str(_python(peer)) if made.exists() and made.read_text() == _wanted(peer) else None


def install(peer: str) -> str | None:
    """Create the environment of a peer, unless it exists. Returns why that failed, or None."""
    module = importlib.import_module(f"benchmarks.peers.{peer}")
    if hasattr(module, "WHY_NOT"):
        return str(module.WHY_NOT)
    if python_of(peer) is not None:
        return None
    steps = [
        [sys.executable, "-m", "venv", "--clear", str(ENVIRONMENTS / peer)],
        [str(_python(peer)), "-m", "pip", "install", "--quiet", *module.REQUIREMENTS],
    ]
    for step in steps:
        done = subprocess.run(step, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            why = (done.stderr.strip() or done.stdout.strip() or f"status {done.returncode}").splitlines()[-1]
            system = " ".join(getattr(module, "SYSTEM", ()))
            return f"{why} (this needs: apt install {system})" if system else why
    _mark(peer).write_text(_wanted(peer))
    return None


def main(peers: list[str]) -> int:
    unknown = sorted(set(peers) - {*PEERS, "all"})
    if not peers or unknown:
        print(f"usage: python -m benchmarks.peers.install {' | '.join(['all', *PEERS])}", file=sys.stderr)
        return 2
    failed = 0
    for peer in PEERS if "all" in peers else peers:
        began = time.perf_counter()
        why = install(peer)
        failed += why is not None
        print(f"{peer}: {'ready' if why is None else f'not installed: {why}'} ({time.perf_counter() - began:.0f} s)")
    return 0 if "all" in peers else failed


def _python(peer: str) -> Path:
    return ENVIRONMENTS / peer / "bin" / "python"


def _mark(peer: str) -> Path:
    return ENVIRONMENTS / peer / "requirements"


def _wanted(peer: str) -> str:
    return "\n".join(importlib.import_module(f"benchmarks.peers.{peer}").REQUIREMENTS)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
