"""The command line. Commands import what they need when they run, so that `loaders --help` is quick."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.console import Console

INTERRUPTED = 130  # how shells report a program ended by Ctrl-C: 128 + SIGINT

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


@app.callback()
def main() -> None:
    """Feeds PyTorch from NumPy-native datasets."""


@app.command()
def bench(
    target: Annotated[str, typer.Argument(help="A folder of images, or module:factory, or file.py:factory.")],
    workers: Annotated[
        str, typer.Option(help="Numbers of workers, such as 0,1,2,4; by default 0 to the number of cores.")
    ] = "",
    methods: Annotated[str, typer.Option(help="process, thread, or both.")] = "process",
    vs: Annotated[str, typer.Option(help="torch: also measure torch's own DataLoader.")] = "",
    batch_size: Annotated[int, typer.Option(min=1, help="Samples in a batch, unless the target is a loader.")] = 64,
    crop: Annotated[int, typer.Option(min=0, help="Side of the random crops, in pixels; 0: whole images.")] = 224,
    rounds: Annotated[int, typer.Option(min=1, help="Measurements of each setup, each in a new process.")] = 3,
    seconds: Annotated[float, typer.Option(min=0.05, help="Approximate length of an epoch.")] = 1.0,
    samples: Annotated[int | None, typer.Option(min=1, help="Samples per epoch, instead of --seconds.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write all figures to this file.")] = None,
    plot_file: Annotated[Path | None, typer.Option("--plot", help="Plot them to this file: PNG, SVG or PDF.")] = None,
) -> None:
    """Measure loaders over a dataset, compared with the most that the dataset and the machine allow."""

    def run(console: Console) -> int:
        from loaders.benchmark.command import run_bench

        run_bench(
            console,
            target,
            workers=workers,
            methods=methods,
            vs=vs,
            json_file=json_file,
            plot_file=plot_file,
            batch_size=batch_size,
            crop=crop,
            rounds=rounds,
            seconds=seconds,
            samples=samples,
        )
        return 0

    _do(run)


@app.command()
def doctor(
    target: Annotated[
        str | None,
        typer.Argument(help="A folder of images, or module:factory, or file.py:factory; else only the machine."),
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="How many samples to read.")] = 32,
    batch_size: Annotated[int, typer.Option(min=1, help="Samples in a batch, unless the target is a loader.")] = 64,
    crop: Annotated[int, typer.Option(min=0, help="Side of the random crops, in pixels; 0: whole images.")] = 0,
    spawn: Annotated[bool, typer.Option(help="Also start a spawned worker, which takes a few seconds.")] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON.")] = False,
) -> None:
    """Check this machine, and a dataset on a few samples. Exits with status 1 if there is a problem, else 0."""

    def run(console: Console) -> int:
        from loaders.doctor.command import run_doctor

        return run_doctor(
            console, target, samples=samples, batch_size=batch_size, crop=crop, spawn=spawn, as_json=as_json
        )

    _do(run)


@app.command()
def prepare(
    source: Annotated[Path, typer.Argument(metavar="SRC", help="Folder of photos, with or without subfolders.")],
    target: Annotated[Path, typer.Argument(metavar="DST", help="Folder to write to: new, or from an earlier run.")],
    quality: Annotated[int | None, typer.Option(min=1, max=100, help="Re-encode at this JPEG quality.")] = None,
    max_side: Annotated[
        int | None, typer.Option(min=1, help="Re-encode at most this many pixels wide and high.")
    ] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="Number of processes; by default one per core.")] = None,
) -> None:
    """Rewrite a folder of photos with restart markers in the JPEGs, so that a crop decodes little more than itself.

    Without --quality and --max-side no pixel changes; this needs the program jpegtran. It may be stopped at any time
    and continues when run again.
    """

    def run(console: Console) -> int:
        from loaders.images.prepare.run import run_prepare

        return run_prepare(console, source, target, quality, max_side, workers)

    _do(run, stopped="Stopped. Run it again to continue.")


def _do(run: Callable[[Console], int], stopped: str = "Stopped.") -> None:
    """Run a command and exit with its status: our own errors print one message without a traceback."""
    from rich.console import Console

    from loaders.errors import LoadersError

    os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # otherwise it contacts a server when it is imported
    failure, status = None, 0
    try:
        status = run(Console(highlight=False, markup=False, soft_wrap=True))
    except KeyboardInterrupt:
        failure, status = stopped, INTERRUPTED
    except LoadersError as error:
        failure, status = str(error), 1
    # By now the frames of the run are gone, and its workers with them.
    if failure is not None:
        typer.echo(failure, err=True)
    raise typer.Exit(status)
