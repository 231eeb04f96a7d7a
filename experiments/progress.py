"""How far a run has come: a bar in a terminal, a line every few seconds anywhere else."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as RichProgress


class _Display(Protocol):
    def update(self, done: int, status: str) -> None: ...
    def note(self, text: str) -> None: ...
    def close(self, status: str) -> None: ...


class Progress:
    """Counts units and keeps the time; `progress` makes one."""

    def __init__(self, total: int, unit: str, done: int, clock: Callable[[], float], display: _Display):
        self._total, self._unit, self._done = total, unit, done
        self._clock, self._display = clock, display
        self._begun = clock()
        # When and where the first chunk ended: speed is measured from there on.
        self._compiled: tuple[float, int] | None = None
        self._metrics = ""
        display.update(done, self.status())

    def advance(self, n: int, /, **metrics_shown: float) -> None:
        """Adds `n` finished units; the metrics are shown beside the count."""
        self._done += n
        self._metrics = "".join(f", {name} {value:.4g}" for name, value in metrics_shown.items())
        if self._compiled is None:
            self._compiled = self._clock(), self._done
            seconds = self._compiled[0] - self._begun
            self._display.note(f"first {n:,} {self._unit} in {seconds:.1f} s, compilation included")
        self._display.update(self._done, self.status())

    def status(self) -> str:
        """`1,200/8,000 updates, 152/s, 0:45 left, loss 0.4312`."""
        count = f"{self._done:,}/{self._total:,} {self._unit}"
        if self._compiled is None:
            return f"{count}, compiling ..."
        seconds = self._clock() - self._compiled[0]
        rate = (self._done - self._compiled[1]) / seconds if seconds > 0 else 0.0
        if rate:
            count += f", {rate:,.0f}/s" if rate >= 10 else f", {rate:.2g}/s"
            if self._done < self._total:
                count += f", {_minutes((self._total - self._done) / rate)} left"
        return count + self._metrics

    def close(self) -> None:
        """Shows where it ended and how long it took."""
        taken = _minutes(self._clock() - self._begun)
        count = f"{self._done:,}/{self._total:,} {self._unit}"
        self._display.close(f"{count} in {taken}{self._metrics}")


@contextmanager
def progress(
    description: str,
    total: int,
    unit: str,
    *,
    done: int = 0,
    interval: float = 10.0,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[Progress]:
    """Shows how many of `total` units are done, of which `done` before this process started.

    The first `advance` ends the compilation: its time is shown apart and enters neither the speed
    nor the time left. Where standard output is no terminal, there is a line at the start, one after
    the first `advance`, one at the end, and between them one at most every `interval` seconds.
    """
    display: _Display
    if sys.stdout.isatty():
        display = _Bar(description, total)
    else:
        display = _Lines(description, interval, clock)
    shown = Progress(total, unit, done, clock, display)
    try:
        yield shown
    finally:
        shown.close()


class _Lines:
    def __init__(self, description: str, interval: float, clock: Callable[[], float]):
        self._description, self._interval, self._clock = description, interval, clock
        self._printed = -float("inf")

    def update(self, done: int, status: str) -> None:
        if self._clock() - self._printed >= self._interval:
            self.note(status)

    def note(self, text: str) -> None:
        print(f"{self._description}: {text}", flush=True)
        self._printed = self._clock()

    def close(self, status: str) -> None:
        self.note(status)


class _Bar:
    def __init__(self, description: str, total: int):
        self._description = description
        self._rich = RichProgress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[status]}", markup=False),
            console=Console(file=sys.stdout),
        )
        self._task = self._rich.add_task(description, total=total, status="")
        self._rich.start()

    def update(self, done: int, status: str) -> None:
        self._rich.update(self._task, completed=done, status=status)

    def note(self, text: str) -> None:
        self._rich.print(f"{self._description}: {text}", markup=False, highlight=False)

    def close(self, status: str) -> None:
        self._rich.update(self._task, status=status)
        self._rich.stop()


def _minutes(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
