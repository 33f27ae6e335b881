"""Train a small network on real photographs for about a minute, and draw a picture of the run: `make demo`.

python -m examples.demo                   the demo's own photographs
python -m examples.demo --data FOLDER     FOLDER/train/<class>/*.jpg and FOLDER/val/<class>/*.jpg
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from loaders.errors import LoadersError

from .photos import cache_folder, demo_photos, package_folder

INTERRUPTED = 130  # how shells report a program ended by Ctrl-C: 128 + SIGINT


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demo; returns the exit status. Errors that the user can fix are printed without a traceback."""
    parser = argparse.ArgumentParser(
        prog="python -m examples.demo", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, help="a folder of photographs, instead of the demo's own")
    parser.add_argument("--out", type=Path, default=Path("demo.png"), help="where to write the picture, a PNG file")
    parser.add_argument("--epochs", type=int, default=12, help="passes over the photographs")
    parser.add_argument("--workers", type=int, default=2, help="worker processes that read and augment")
    options = parser.parse_args(arguments)
    try:
        run(options.data, options.out, options.epochs, options.workers, Console(highlight=False, soft_wrap=True))
    except KeyboardInterrupt:
        failure, status = "Stopped.", INTERRUPTED
    except LoadersError as error:
        failure, status = str(error), 1
    else:
        return 0
    # Here the frames of the run are gone, and its workers with them.
    print(failure, file=sys.stderr)
    return status


def run(data: Path | None, out: Path, epochs: int, workers: int, console: Console) -> None:
    """Train on `data`, or on the demo's photographs; save the network in the cache folder and draw the picture `out`.

    Raises:
        MissingExtraError: a package of the `demo` extra is not installed.
        DatasetError: `data` does not hold train/<class>/ and val/<class>/ with images.
    """
    package_folder("matplotlib")  # checked before a minute of training, not after it
    folder = data if data is not None else demo_photos()

    # Imported here, because they take seconds, and what is missing is better reported at once.
    import torch

    from .network import save
    from .picture import draw
    from .train import train

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    # Leave cores to the workers: torch's threads wait for one another, so one without a core delays all of them.
    torch.set_num_threads(max(1, torch.get_num_threads() - workers))
    console.print(f"Training on {folder}, on {device} with {workers} workers.")
    net, classes, record = train(folder, epochs=epochs, workers=workers, device=device, console=console)
    kept = cache_folder() / "network.pt"
    save(kept, net, classes)
    draw(record, out)
    console.print(
        f"{record.epochs[-1].accuracy:.1%} of the validation photographs recognised, in {record.seconds:.0f} s."
    )
    console.print(f"Picture: {out.resolve()}\nNetwork: {kept}")


if __name__ == "__main__":
    sys.exit(main())
