"""The tables and plots of benchmarks/README.md, made from the files in results/: `python -m benchmarks.tables`."""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import delivery, detection, harness, images, patches, randomness, sampler, scale, tar, waiting
from benchmarks.harness import machine_line, table
from benchmarks.peers import PEERS
from benchmarks.runs import TABLES, Scenario, peer_module

OURS = "ours"
_BAR, _OURS_BAR = "#9ca3af", "#1f5fa8"

Rounds = Sequence[Mapping[str, Any] | None]


def values(content: Mapping[str, Any], scenario: Scenario, peer: str) -> list[float | None]:
    """A peer's figure in each round, as displayed; None where a round failed or had no such figure."""
    rounds: Rounds = content["figures"].get(scenario.run, {}).get(peer, [])
    found = [one.get(scenario.figure) if one is not None else None for one in rounds]
    return [value * scenario.scale if value is not None else None for value in found]


def medians(content: Mapping[str, Any], scenario: Scenario) -> dict[str, float]:
    """Peer → the median of its rounds, for peers that have the figure."""
    found = {}
    for peer in PEERS:
        known = [value for value in values(content, scenario, peer) if value is not None]
        if known:
            found[peer] = statistics.median(known)
    return found


def ahead(content: Mapping[str, Any], scenario: Scenario) -> dict[str, float]:
    """Peer → how many times as good as ours it is, for peers that are better: the median of ratios within rounds."""
    found = {}
    for peer in PEERS:
        pairs = zip(values(content, scenario, peer), values(content, scenario, OURS), strict=False)
        ratios = [ours / theirs if scenario.lower else theirs / ours for theirs, ours in pairs if theirs and ours]
        if peer != OURS and ratios and statistics.median(ratios) > 1:
            found[peer] = statistics.median(ratios)
    return found


def comparison(content: Mapping[str, Any], plot: str | None = None) -> str:
    """All tables of a result of `benchmarks.compare`."""
    lines = [
        "## Loaders",
        "",
        f"Median (quartiles) of {content['rounds']} rounds, each in a fresh process; the best of a column is bold. "
        "Where a cell is empty, the peer does not do this, or it was not measured. Photographs: JPEG files of 500 x "
        "375 pixels, a random crop of each resized to 224 x 224 and maybe mirrored, in batches of 64. "
        f"`python -m benchmarks.compare`. {machine_line(content['machine'])}",
    ]
    if content["short"]:
        lines += ["", "**A trial with short runs: its figures are no measurement.**"]
    if plot is not None:
        lines += ["", f"![Each figure of each loader as a bar]({plot})"]
    for title, scenarios in TABLES.items():
        shown = [scenario for scenario in scenarios if medians(content, scenario)]
        if shown:
            lines += ["", f"### {title}", "", _table(content, shown), "", _who_is_ahead(content, shown)]
    lines += ["", "### Versions", ""]
    lines += [f"- {_name(peer)}: {', '.join(pinned)}" for peer, pinned in content["versions"].items() if pinned]
    lines += [f"- not measured: {_who(key)}: {why}" for key, why in content["not_measured"].items()]
    return "\n".join(lines).rstrip()


def draw(content: Mapping[str, Any], path: Path) -> None:
    """A panel of bars for each figure, ours in another colour."""
    from matplotlib.figure import Figure

    shown = [scenario for scenarios in TABLES.values() for scenario in scenarios if medians(content, scenario)]
    figure: Any = Figure(figsize=(13, 3.2 * -(-len(shown) // 2)), dpi=80, layout="constrained")
    for axes, scenario in zip(figure.subplots(-(-len(shown) // 2), 2, squeeze=False).flat, shown, strict=False):
        found = medians(content, scenario)
        colours = [_OURS_BAR if peer == OURS else _BAR for peer in found]
        axes.barh([_name(peer) for peer in found], list(found.values()), color=colours, height=0.7)
        axes.invert_yaxis()
        axes.set_title(f"{scenario.title} ({'less' if scenario.lower else 'more'} is better)", loc="left", fontsize=10)
        axes.tick_params(labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    for axes in figure.axes[len(shown) :]:
        axes.axis("off")
    figure.savefig(path, metadata={"Software": None})


# Section of the README → the file in results/ and the function that makes Markdown from it.
SECTIONS: dict[str, tuple[str, Callable[[Mapping[str, Any]], str]]] = {
    "peers": ("peers", lambda content: comparison(content, "results/peers.png")),
    "delivery": ("delivery", delivery.section),
    "sampler": ("sampler", sampler.section),
    "waiting": ("waiting", waiting.section),
    "scale": ("scale", scale.section),
    "randomness": ("randomness", randomness.section),
    "images": ("images", images.section),
    "patches": ("patches", patches.section),
    "detection": ("detection", detection.section),
    "tar": ("tar", tar.section),
}


def kept(name: str) -> dict[str, Any] | None:
    """The saved result of a section; None if there is none, or only a trial."""
    path = harness.RESULTS / f"{SECTIONS[name][0]}.json"
    if not path.exists():
        return None
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return None if content.get("short") else content


def main() -> int:
    for name, (file, section) in SECTIONS.items():
        content = kept(name)
        if content is None:
            print(f"{name}: no measurement in results/{file}.json", file=sys.stderr)
            continue
        harness.write_section(name, section(content))
        if name == "peers":
            draw(content, harness.RESULTS / "peers.png")
    return 0


def _table(content: Mapping[str, Any], scenarios: Sequence[Scenario]) -> str:
    rows = []
    for peer in PEERS:
        cells = [_cell(content, scenario, peer) for scenario in scenarios]
        if any(cells):
            rows.append([_name(peer), *cells])
    return table(["", *(scenario.title for scenario in scenarios)], rows)


def _cell(content: Mapping[str, Any], scenario: Scenario, peer: str) -> str:
    known = [value for value in values(content, scenario, peer) if value is not None]
    if not known:
        return ""
    form = f",.{scenario.digits}f"
    middle = f"{statistics.median(known):{form}}"
    found = medians(content, scenario)
    if found[peer] == (min if scenario.lower else max)(found.values()):
        middle = f"**{middle}**"
    if len(known) == 1:
        return middle
    low, _, high = statistics.quantiles(known, n=4, method="inclusive")
    return f"{middle} ({low:{form}} to {high:{form}})"


def _who_is_ahead(content: Mapping[str, Any], scenarios: Sequence[Scenario]) -> str:
    """A sentence that says where a peer is better than ours, by ratios within rounds."""
    told = []
    for scenario in scenarios:
        better = sorted(ahead(content, scenario).items(), key=lambda pair: -pair[1])
        if better:
            names = ", ".join(f"{_name(peer)} {ratio:.2f} times" for peer, ratio in better)
            told.append(f"{scenario.title.rpartition(':')[0]}: {names}")
    return f"Better than ours: {'; '.join(told)}." if told else "No peer is better than ours in any column."


def _name(peer: str) -> str:
    return str(peer_module(peer).NAME)


def _who(key: str) -> str:
    peer, comma, run = key.partition(", ")
    return f"{_name(peer)}{comma}{run}"


if __name__ == "__main__":
    sys.exit(main())
