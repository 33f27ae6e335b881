"""Progress in the terminal: a live bar, and one line for each finished epoch (only the lines when piped)."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from .record import EpochRecord, WindowRecord, samples_per_s, waiting_share


class Display:
    """Shows epochs as they run. A context manager: leaving it, also by Ctrl-C, restores the terminal."""

    def __init__(self, console: Console, epochs: int, samples: int) -> None:
        self.console = console
        self.epochs = epochs
        self.samples = samples
        self._epoch = 0
        columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[numbers]}"))
        # No refresh thread: workers are forked while this is shown, and a thread could hold a lock during the fork.
        self._progress = Progress(
            *columns, console=console, auto_refresh=False, transient=True, disable=not console.is_terminal
        )
        self._task = self._progress.add_task("", total=samples, numbers="")

    def __enter__(self) -> Display:
        self._progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._progress.stop()

    def start_epoch(self) -> None:
        """Count the epoch and reset the bar."""
        self._epoch += 1
        self._progress.reset(self._task, description=self._name())

    def show_window(self, window: WindowRecord) -> None:
        """Advance the bar."""
        self._progress.update(self._task, advance=window.samples, numbers=_numbers([window]), refresh=True)

    def end_epoch(self, epoch: EpochRecord) -> None:
        """Print the line of a finished epoch."""
        line = f"{self._name()}  {_numbers(epoch.windows)}  accuracy {epoch.accuracy:6.1%}"
        self.console.print(line)

    def _name(self) -> str:
        return f"epoch {self._epoch:{len(str(self.epochs))}}/{self.epochs}"


def _numbers(windows: Sequence[WindowRecord]) -> str:
    rate, waiting = samples_per_s(windows), waiting_share(windows)
    return f"{rate:6,.0f} samples/s  waiting {waiting:4.0%}  loss {windows[-1].loss:.3f}"
