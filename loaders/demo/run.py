"""The whole demo, as `loaders demo` runs it."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from loaders.demo.photos import cache_folder, demo_photos, package_folder


def run_demo(data: Path | None, out: Path, epochs: int, workers: int, console: Console) -> None:
    """Train on `data`, or on the demo's photographs; keep the network in the cache folder and draw the picture `out`.

    Raises:
        MissingExtraError: a package of the `demo` extra is not installed.
        DatasetError: `data` does not hold train/<class>/ and val/<class>/ with images.
    """
    package_folder("matplotlib")  # asked before a minute of training, not after it
    folder = data if data is not None else demo_photos()

    # Here, because they take seconds to import, and what is missing is better said at once.
    import torch

    from loaders.demo.network import save
    from loaders.demo.picture import draw
    from loaders.demo.train import train

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    # Workers need their cores: torch's threads wait for one another, and one that finds no core holds up all.
    torch.set_num_threads(max(1, torch.get_num_threads() - workers))
    console.print(f"Training on {folder}, on {device} with {workers} workers.")
    net, classes, run = train(folder, epochs=epochs, workers=workers, device=device, console=console)
    kept = cache_folder() / "network.pt"
    save(kept, net, classes)
    draw(run, out)
    console.print(f"{run.epochs[-1].accuracy:.1%} of the validation photographs recognised, in {run.seconds:.0f} s.")
    console.print(f"Picture: {out.resolve()}\nNetwork: {kept}")
