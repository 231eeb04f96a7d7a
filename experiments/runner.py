"""Runs a compiled training function chunk by chunk, with all that a long run needs around it.

A stage of an experiment is a function `chunk(state) -> (state, metrics)` that does many training
steps in one compiled program. `train_chunks` calls it, shows progress, logs, saves checkpoints and
goes on from the last one after a kill. The state carries its own step counter and key, so a resumed
run draws the same numbers and ends bit for bit where an uninterrupted one does.
"""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.progress import progress
from experiments.run_directory import (
    RunDirectory,
    RunError,
    host_array,
    resume_command,
)
from seqmod import checkpoint, npz
from seqmod.checkpoint import CheckpointError

__all__ = [
    "Interrupted",
    "NonFiniteLoss",
    "RunDirectory",
    "RunError",
    "clean_exit",
    "progress",
    "train_chunks",
]

_SHOWN = 4  # metrics beside the progress bar
_SECONDS = "/seconds"  # among the metrics of a file; no metric has this name


class Interrupted(Exception):
    """SIGINT or SIGTERM; the run is saved, and the message says how to go on."""


class NonFiniteLoss(Exception):
    """The loss or the state stopped being finite; the last good checkpoint is kept."""


def train_chunks[S](
    run: RunDirectory,
    stage: str,
    state: S,
    chunk: Callable[[S], tuple[S, Mapping[str, Any]]],
    n_chunks: int,
    *,
    units_per_chunk: int,
    unit: str,
    config: Mapping[str, Any],
    checkpoint_every: int,
    loss_key: str | None = "loss",
    time_budget: float | None = None,
) -> tuple[S, dict[str, np.ndarray]]:
    """Calls `chunk` until it has run `n_chunks` times; returns the last state and all metrics.

    Args:
      run: the open run; a stage that has checkpoints in it goes on from the newest.
      stage: name of the stage, unique in the run.
      state: the initial state, a pytree of arrays, typed keys and numbers (which become arrays).
        It may be donated by `chunk`.
      chunk: one compiled program of many steps. Its metrics are scalars or arrays whose leading
        axis is the step within the chunk.
      n_chunks: how often to call it in all, counting the calls before a resume.
      units_per_chunk: what a chunk gets done, in `unit`s ("updates", "episodes"); steps in
        metrics.jsonl and messages are counted in them.
      unit: the name of what is counted, in the plural.
      config: what a checkpoint must have been made with to be resumed (anything JSON can hold).
      checkpoint_every: chunks between checkpoints; there is one at the end in any case.
      loss_key: the metric that must stay finite; None to check nothing.
      time_budget: seconds, over all resumes, after which to stop early, at the end of a chunk.

    Returns:
      The state, and for each metric an array over all chunks, those before a resume included:
      scalars are stacked to (chunks,), others joined along their leading axis.

    Raises:
      Interrupted: after SIGINT or SIGTERM; the current chunk was finished and saved.
      NonFiniteLoss: a NaN or infinite loss, or a NaN in the state that was to be saved.
      CheckpointMismatch: the checkpoints of this stage are of another configuration or state.
      CheckpointError: all of them are damaged.
      RunError: arguments that cannot be right.
    """
    if n_chunks < 1 or units_per_chunk < 1 or checkpoint_every < 1:
        raise RunError(
            f"stage {stage}: n_chunks={n_chunks}, units_per_chunk={units_per_chunk} and "
            f"checkpoint_every={checkpoint_every} must be at least 1"
        )
    saves = run.stage_directory(stage) / "checkpoints"
    history = _History(run.stage_directory(stage) / "metrics")
    config = {**config, "units_per_chunk": units_per_chunk}
    state = _strongly_typed(state)
    done = 0
    if checkpoint.latest_step(saves) is not None:
        done, state = checkpoint.restore(saves, state, config)
    if done > n_chunks:
        raise RunError(f"stage {stage}: {done} chunks are done, more than n_chunks={n_chunks}")
    history.load(done)
    run.truncate_log(stage, done * units_per_chunk)

    def save() -> None:
        if (leaf := _nan_leaf(state)) is not None:
            raise NonFiniteLoss(
                f"stage {stage}: NaN in {leaf} of the state at step "
                f"{done * units_per_chunk:,}. {_last_good(saves, units_per_chunk)}"
            )
        history.save()  # first: a checkpoint without its metrics could not be resumed
        checkpoint.save(saves, done, state, config)

    def finished() -> bool:
        return done == n_chunks or (time_budget is not None and history.seconds >= time_budget)

    if finished():
        return state, history.metrics()
    total = n_chunks * units_per_chunk
    with (
        _catch_signals() as received,
        progress(stage, total, unit, done=done * units_per_chunk) as bar,
    ):
        while not (received or finished()):
            begun = time.monotonic()
            state, metrics = chunk(state)
            state = _strongly_typed(state)
            metrics = {name: host_array(value) for name, value in jax.device_get(metrics).items()}
            step = done * units_per_chunk
            means = {name: value.mean(0) if value.ndim else value for name, value in metrics.items()}
            run.log(stage, step + units_per_chunk, means)
            if loss_key is not None:
                bad = _first_bad(_loss(metrics, loss_key, stage), units_per_chunk)
                if bad is not None:
                    raise NonFiniteLoss(
                        f"stage {stage}: {loss_key} is not finite at step {step + bad:,}. "
                        f"{_last_good(saves, units_per_chunk)}"
                    )
            done += 1
            history.add(metrics, time.monotonic() - begun)
            scalars = {name: float(value) for name, value in means.items() if value.ndim == 0}
            first = sorted(scalars, key=lambda name: name != loss_key)[:_SHOWN]
            bar.advance(units_per_chunk, **{name: scalars[name] for name in first})
            if done % checkpoint_every == 0:
                save()
        if history.saved < done:
            save()
    if received:
        raise Interrupted(
            f"{received[0].name}: stage {stage} stopped at step {done * units_per_chunk:,} of "
            f"{total:,} and is saved. To go on:\n  {resume_command(run.path)}"
        )
    return state, history.metrics()


@contextmanager
def clean_exit() -> Iterator[None]:
    """Around a program's main: expected failures end it with a message instead of a traceback.

    Exit status 130 after an interruption (resume it), 1 after an error.
    """
    try:
        yield
    except Interrupted as stop:
        print(f"\n{stop}", file=sys.stderr)
        raise SystemExit(130) from None
    except (RunError, NonFiniteLoss, CheckpointError) as error:
        print(f"\nerror: {error}", file=sys.stderr)
        raise SystemExit(1) from None


class _History:
    """The metrics of all chunks so far; on disk, a file for the chunks between two checkpoints."""

    def __init__(self, folder: Path):
        self._folder = folder
        self._pieces: list[dict[str, np.ndarray]] = []
        self._unsaved: list[dict[str, np.ndarray]] = []
        self._unsaved_seconds = 0.0
        self.seconds = 0.0
        self.saved = 0

    def load(self, done: int) -> None:
        """Reads the first `done` chunks and deletes what a kill left beyond them."""
        self._folder.mkdir(exist_ok=True)
        for path in sorted(self._folder.glob("*.npz")):
            first, last = map(int, path.stem.split("-"))
            if last > done:
                path.unlink()
                continue
            if first != self.saved + 1:
                break
            piece = npz.read(path)
            self.seconds += float(piece.pop(_SECONDS))
            self._pieces.append(piece)
            self.saved = last
        if self.saved != done:
            raise RunError(
                f"{self._folder} lacks the metrics of chunk {self.saved + 1} (there is a checkpoint "
                f"of chunk {done}): delete the folder of this stage to run it again"
            )

    def add(self, metrics: dict[str, np.ndarray], seconds: float) -> None:
        """Appends the metrics of one chunk, which took `seconds`."""
        self._unsaved.append({name: np.atleast_1d(value) for name, value in metrics.items()})
        self._unsaved_seconds += seconds
        self.seconds += seconds

    def save(self) -> None:
        """Writes the chunks since the last save."""
        piece = _join(self._unsaved)
        first, last = self.saved + 1, self.saved + len(self._unsaved)
        path = self._folder / f"{first:09d}-{last:09d}.npz"
        npz.write(path, {**piece, _SECONDS: np.asarray(self._unsaved_seconds)})
        self._pieces.append(piece)
        self._unsaved, self._unsaved_seconds, self.saved = [], 0.0, last

    def metrics(self) -> dict[str, np.ndarray]:
        """Every metric over all chunks."""
        return _join(self._pieces + self._unsaved)


def _join(pieces: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    names = pieces[0] if pieces else ()
    return {name: np.concatenate([piece[name] for piece in pieces]) for name in names}


@contextmanager
def _catch_signals() -> Iterator[list[signal.Signals]]:
    """Collects SIGINT and SIGTERM instead of ending the process; a second SIGINT does end it."""
    received: list[signal.Signals] = []

    def note(number: int, frame: FrameType | None) -> None:
        if received and number == signal.SIGINT:
            raise KeyboardInterrupt
        received.append(signal.Signals(number))
        # Not print: the handler may have interrupted one.
        os.write(2, b"\nfinishing this chunk, then saving (Ctrl-C again stops at once)\n")

    if threading.current_thread() is not threading.main_thread():
        yield received  # only the main thread may set handlers
        return
    previous = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _strongly_typed[S](state: S) -> S:
    """The state as arrays without weak types, which a checkpoint would lose.

    A resumed state must have the types of an uninterrupted one, and the second chunk those of the
    first, or it would be compiled again.
    """

    def convert(leaf: Any) -> jax.Array:
        array = leaf if isinstance(leaf, jax.Array) else jnp.asarray(leaf)
        weak = jax.typeof(array).weak_type
        return jax.lax.convert_element_type(array, array.dtype) if weak else array

    return jax.tree.map(convert, state)


def _nan_leaf(state: Any) -> str | None:
    """The path of the first leaf with a NaN: a state may be bad although its last loss was not."""
    for path, leaf in jax.tree_util.tree_flatten_with_path(state)[0]:
        if jnp.issubdtype(leaf.dtype, jnp.inexact) and np.isnan(np.asarray(leaf)).any():
            return jax.tree_util.keystr(path, simple=True, separator="/")
    return None


def _loss(metrics: Mapping[str, np.ndarray], loss_key: str, stage: str) -> np.ndarray:
    if loss_key not in metrics:
        raise RunError(
            f"stage {stage}: no metric {loss_key!r} among {sorted(metrics)}: name the loss with loss_key, or give None"
        )
    return metrics[loss_key]


def _first_bad(loss: np.ndarray, units_per_chunk: int) -> int | None:
    """The first of the chunk's units whose loss is not finite, from 1 on."""
    rows = np.atleast_1d(loss)
    bad = ~np.isfinite(rows).reshape(len(rows), -1).all(1)
    return -(-(int(bad.argmax()) + 1) * units_per_chunk // len(rows)) if bad.any() else None


def _last_good(saves: Path, units_per_chunk: int) -> str:
    done = checkpoint.latest_step(saves)
    if done is None:
        return "There is no checkpoint yet: lower the learning rate, say, and start again."
    return (
        f"The last good checkpoint is of step {done * units_per_chunk:,}, in {saves}. Resumed as it "
        "is, the run would do the same again: lower the learning rate, say, and start anew."
    )
