"""The command line. Commands import what they need when they run, so that `loaders --help` is quick."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

INTERRUPTED = 130  # how shells report a program that Ctrl-C ended: 128 + SIGINT

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


@app.callback()
def main() -> None:
    """Feeds PyTorch from NumPy-native datasets."""


@app.command()
def demo(
    data: Annotated[
        Path | None, typer.Option(help="Folder with train/CLASS/*.jpg and val/CLASS/*.jpg instead of the demo's own.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Where to write the picture, a PNG file.")] = Path("demo.png"),
    epochs: Annotated[int, typer.Option(min=1, help="How often to go through the photographs.")] = 12,
    workers: Annotated[int, typer.Option(min=0, help="Processes that read and augment.")] = 2,
) -> None:
    """Train a small network on real photographs for about a minute, and draw a picture of the run."""
    from rich.console import Console

    from loaders.errors import LoadersError

    failure, status = None, 0
    try:
        from loaders.demo.run import run_demo

        run_demo(data, out, epochs, workers, Console(highlight=False, markup=False, soft_wrap=True))
    except KeyboardInterrupt:
        failure, status = "Stopped.", INTERRUPTED
    except LoadersError as error:
        failure, status = str(error), 1
    # Out here the run's frames are gone, and its workers with them.
    if failure is not None:
        typer.echo(failure, err=True)
    raise typer.Exit(status)


@app.command()
def prepare(
    source: Annotated[Path, typer.Argument(metavar="SRC", help="Folder of photos, in folders or not.")],
    target: Annotated[Path, typer.Argument(metavar="DST", help="Folder to write: new, or of an earlier run.")],
    quality: Annotated[int | None, typer.Option(min=1, max=100, help="Encode anew, at this JPEG quality.")] = None,
    max_side: Annotated[
        int | None, typer.Option(min=1, help="Encode anew, at most so many pixels wide and high.")
    ] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="Processes; as many as there are cores.")] = None,
) -> None:
    """Write a folder of photos again with restart markers in the JPEGs, so that crops cost what the crop costs.

    Without --quality and --max-side no pixel changes; that takes the program jpegtran. It may be stopped at any time
    and run again.
    """
    from loaders.errors import LoadersError

    failure, status = None, 0
    try:
        from loaders.prepare.run import run_prepare

        status = run_prepare(source, target, quality, max_side, workers)
    except OSError as error:  # of a folder; files that cannot be read or written are listed
        failure, status = str(error), 1
    except KeyboardInterrupt:
        failure, status = "Stopped. Run it again to go on.", INTERRUPTED
    except LoadersError as error:
        failure, status = str(error), 1
    if failure is not None:
        typer.echo(failure, err=True)
    raise typer.Exit(status)
