"""Time the kernels against textbook forms and published implementations, and print their errors against float64.

All contenders of a cell (case, pass, length) are compiled, checked against the definition, and then timed one call
after the other in rounds, each in a process of its family, so that noise hits them alike: quote ratios within a cell.
"Forward" is the output alone, "forward+backward" the output and the gradients of all inputs. A contender is not timed
where its temporary memory exceeds `--memory-gib`, or beyond the length at which a call took `--slowest` seconds; what
is missing is listed with the reason. Processes keep freed memory, so that fresh pages are not what is timed. Peers are
timed if `--peers` names a folder for their virtual environments, which are made there on first use.

`--device gpu` runs bfloat16 inputs against the kernels for GPUs, beside the ceilings of the card as measured by a
matrix product and a copy; `--device interpret` is the same code on tiny shapes with interpreted kernels, for tests.

Command: python -m experiments.bench.kernels [--peers DIR] [--out FILE.json] [--figure FILE.png] | --numerics
A run that was cut short goes on with the same `--out`.
"""

import json
import os
import statistics
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from experiments import plotting
from experiments.bench import cases
from experiments.bench import numerics as errors
from experiments.bench.internal_rl import timed
from experiments.bench.peers import LEFT_OUT, PEERS, environment
from experiments.bench.worker import Local, Process, Worker

Device = Literal["cpu", "gpu", "interpret"]
Clock = Literal["wall", "process"]
AUTO, SCAN, CHUNKED = "ours auto", "ours reference", "ours chunked"
PASSES = {False: "forward", True: "forward+backward"}


@dataclass(frozen=True)
class Setting:
    """What a device runs: the first contender that runs is what the others' results are compared with."""

    contenders: tuple[str, ...]
    lengths: tuple[int, ...]
    sizes: str
    narrow: bool
    tolerance: float


SETTINGS: dict[Device, Setting] = {
    "cpu": Setting(
        (SCAN, AUTO, "quadratic", "associative scan"), (512, 1024, 2048, 4096, 8192, 16384), "cpu", False, 1e-3
    ),
    "gpu": Setting(
        (AUTO, "ours pallas_gpu", "softmax attention"), tuple(2**n for n in range(11, 17)), "gpu", True, 5e-2
    ),
    "interpret": Setting((AUTO, "ours pallas_gpu interpreted", "softmax attention"), (64,), "tiny", True, 5e-2),
}


@dataclass(frozen=True)
class Row:
    """One contender in one cell: median, least and process seconds a call, or the reason why there are none.

    `temporary` is what the compiled program needs beside inputs and results, in bytes; `error` the largest relative
    error of the output and the gradients against the definition, in the L2 norm.
    """

    case: str
    backward: bool
    length: int
    contender: str
    seconds: float | None = None
    least: float | None = None
    work: float | None = None
    temporary: float | None = None
    error: float | None = None
    reason: str = ""


def measure(
    device: Device,
    workers: dict[str, Worker],
    which: Sequence[str],
    lengths: Sequence[int],
    repeats: int,
    most_bytes: float,
    slowest: float,
    known: Sequence[Row] = (),
) -> Iterator[list[Row]]:
    """Time every contender in every cell but those of `known` rows; `workers` has one for each, by name."""
    have = {(row.case, row.backward, row.length) for row in known}
    for case, backward in product(which, PASSES):
        stopped: dict[str, str] = {}
        for length in lengths:
            if (case, backward, length) not in have:
                with tempfile.TemporaryDirectory() as scratch:
                    file = Path(scratch) / "wanted.npz"
                    cell = [Row(case, backward, length, name, reason=stopped.get(name, "")) for name in workers]
                    cell = [
                        row if row.reason else _prepare(device, row, workers[row.contender], most_bytes, file)
                        for row in cell
                    ]
                cell = _time(cell, workers, repeats)
                for worker in set(workers.values()):
                    worker.ask({"do": "drop", "with": {}})
                yield cell
            else:
                cell = [row for row in known if (row.case, row.backward, row.length) == (case, backward, length)]
            for row in cell:
                if row.reason:
                    stopped.setdefault(row.contender, row.reason)
                elif row.seconds is not None and row.seconds > slowest:
                    stopped[row.contender] = f"a call took {row.seconds:.1f} s at length {length}"


def _brief(row: Row) -> str:
    return f"{row.contender} " + (row.reason if row.seconds is None else f"{1e3 * row.seconds:.2f} ms")


def _prepare(device: Device, row: Row, worker: Worker, most_bytes: float, file: Path) -> Row:
    """The row with what is known before it is timed."""
    setting = SETTINGS[device]
    # Softmax attention is another function.
    same = row.contender != "softmax attention"
    answer = worker.ask(
        {
            "do": "prepare",
            "with": {
                "key": row.contender,
                "name": row.contender,
                "case": row.case,
                "length": row.length,
                "sizes": setting.sizes,
                "backward": row.backward,
                "narrow": setting.narrow,
                "platform": "gpu" if device == "gpu" else "cpu",
                "most_bytes": most_bytes,
                "compare": str(file) if same and file.exists() else "",
                "keep": str(file) if same and not file.exists() else "",
                "tolerance": setting.tolerance,
            },
        }
    )
    if "refused" in answer:
        return replace(row, reason=answer["refused"])
    return replace(row, temporary=answer["temporary"], error=answer["error"])


def _time(cell: Sequence[Row], workers: dict[str, Worker], repeats: int) -> list[Row]:
    """The rows with their times."""
    samples = _rounds({row.contender: workers[row.contender] for row in cell if not row.reason}, repeats)
    rows = []
    for row in cell:
        if taken := samples.get(row.contender):
            row = replace(
                row,
                seconds=statistics.median(each["seconds"] for each in taken),
                least=min(each["seconds"] for each in taken),
                work=statistics.median(each["work"] for each in taken),
            )
        elif not row.reason:
            row = replace(row, reason="its process died")
        rows.append(row)
    return rows


def _rounds(ready: dict[str, Worker], repeats: int) -> dict[str, list[dict[str, float]]]:
    """Samples by contender, in turns: one call, or as many as fill 20 ms. Slow ones stop after 3 samples and 3 s."""
    samples: dict[str, list[dict[str, float]]] = {name: [] for name in ready}
    calls = dict.fromkeys(ready, 1)
    for turn in range(repeats + 1):
        for name, worker in ready.items():
            taken = samples[name]
            if len(taken) >= 3 and sum(each["seconds"] * calls[name] for each in taken) > 3:
                continue
            answer = worker.ask({"do": "time", "with": {"key": name, "calls": calls[name]}})
            if "refused" in answer:
                continue
            if turn:
                taken.append(answer)
            else:  # The first one only says how many calls to take.
                calls[name] = int(min(50, max(1, 0.02 / answer["seconds"])))
    return samples


def ceilings(narrow: bool, tiny: bool, repeats: int) -> tuple[float, float]:
    """Operations a second of a square matrix product, and bytes a second of a copy, counting both directions."""
    dtype = jnp.bfloat16 if narrow else jnp.float32
    size, count = (64, 2**12) if tiny else (8192, 2**30) if narrow else (2048, 2**26)
    square = jax.random.normal(jax.random.key(0), (size, size)).astype(dtype)
    array = jax.random.normal(jax.random.key(1), (count,)).astype(dtype)
    matmul, copy = jax.jit(jnp.matmul), jax.jit(lambda x: -x)
    product, moved = timed(lambda: matmul(square, square), repeats), timed(lambda: copy(array), repeats)
    return 2.0 * size**3 / product, 2.0 * array.nbytes / moved


def growth(rows: Iterable[Row], start: int = 1024) -> float | None:
    """Exponent of time against length, fitted from `start` up; None with fewer than three lengths."""
    points = [(row.length, row.seconds) for row in rows if row.seconds is not None and row.length >= start]
    if len(points) < 3:
        return None
    lengths, seconds = np.log(np.array(points)).T
    return float(np.polyfit(lengths, seconds, 1)[0])


def _groups(rows: Sequence[Row]) -> dict[tuple[str, bool], dict[str, list[Row]]]:
    """Rows by (case, backward) and contender, in the order in which they came."""
    found: dict[tuple[str, bool], dict[str, list[Row]]] = {}
    for row in rows:
        found.setdefault((row.case, row.backward), {}).setdefault(row.contender, []).append(row)
    return found


def table(rows: Sequence[Row]) -> str:
    """Milliseconds by length, times those of `auto` in brackets; the exponent of growth; temporary memory."""
    lengths = sorted({row.length for row in rows})
    head = ["case", "pass", "contender", *map(str, lengths), "growth", "temporary MiB"]
    lines = [head, ["---"] * len(head)]
    for (case, backward), contenders in _groups(rows).items():
        base = {row.length: row.seconds for row in contenders.get(AUTO, [])}
        for name, group in contenders.items():
            timed_rows = {row.length: row for row in group if row.seconds is not None}
            if not timed_rows:
                continue
            cells = []
            for length in lengths:
                row, auto = timed_rows.get(length), base.get(length)
                if row is None or row.seconds is None:
                    cells.append("-")
                    continue
                ratio = "" if name == AUTO or auto is None else f" ({row.seconds / auto:.2g}x)"
                cells.append(f"{1e3 * row.seconds:.3g}{ratio}")
            exponent, last = growth(group), timed_rows[max(timed_rows)]
            memory = "-" if last.temporary is None else f"{last.temporary / 2**20:.3g} at {last.length}"
            lines.append([case, PASSES[backward], name, *cells, "-" if exponent is None else f"{exponent:.2f}", memory])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def rates(rows: Sequence[Row], device: Device, peak: float, copied: float) -> str:
    """Operations and bytes a second that the recurrence itself needs, as shares of the measured ceilings."""
    setting = SETTINGS[device]
    sizes, narrow = cases.SIZES[setting.sizes], 2 if setting.narrow else 4
    lines = [
        f"ceilings: matrix product {peak / 1e12:.3g} TFLOP/s, copy {copied / 1e9:.3g} GB/s",
        "| case | pass | contender | length | GFLOP/s | of product | GB/s | of copy |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        if row.seconds is None:
            continue
        kind = "attention" if row.contender == "softmax attention" else row.case
        work = cases.flops(kind, row.length, sizes, row.backward) / row.seconds
        moved = cases.traffic(row.case, row.length, sizes, row.backward, narrow) / row.seconds
        lines.append(
            f"| {row.case} | {PASSES[row.backward]} | {row.contender} | {row.length} | {work / 1e9:.3g} "
            f"| {work / peak:.1%} | {moved / 1e9:.3g} | {moved / copied:.1%} |"
        )
    return "\n".join(lines)


def missing(rows: Sequence[Row]) -> str:
    """What was not timed and why, one line for each contender, case and reason."""
    found: dict[tuple[str, str, str], dict[str, list[str]]] = {}
    for row in rows:
        if row.seconds is None and "has no op" not in row.reason:
            passes = found.setdefault((row.contender, row.case, row.reason), {})
            passes.setdefault(PASSES[row.backward], []).append(str(row.length))
    lines = []
    for (name, case, reason), passes in found.items():
        where = "; ".join(f"{each} at {', '.join(lengths)}" for each, lengths in passes.items())
        lines.append(f"- {name}, {case}: {where}: {reason}")
    return "\n".join(lines)


def goals(rows: Sequence[Row]) -> str:
    """The three goals for CPUs, by case, each with the worst it came to."""
    lines = [
        "| case | forward / token scan, at worst | forward+backward / best other from 1024 up, at worst | growth |",
        "| --- | --- | --- | --- |",
    ]
    groups = _groups(rows)
    for case in dict.fromkeys(row.case for row in rows):
        cells = []
        for backward, others, start, most in ((False, (SCAN,), 0, 1.2), (True, None, 1024, 1.0)):
            contenders = groups.get((case, backward), {})
            worst = _worst(contenders, others, start)
            if worst is None:
                cells.append("not measured")
                continue
            ratio, length, other = worst
            cells.append(f"{ratio:.2f} at {length} ({other}): {'holds' if ratio <= most else 'misses'}")
        exponents = [growth(groups.get((case, backward), {}).get(AUTO, [])) for backward in PASSES]
        cells.append(", ".join("-" if each is None else f"{each:.2f}" for each in exponents))
        lines.append(f"| {case} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _worst(contenders: dict[str, list[Row]], others: tuple[str, ...] | None, start: int):
    """Largest ratio of the time of `auto` to the best of `others` (all, if None), with its length and that one."""
    mine = {row.length: row.seconds for row in contenders.get(AUTO, []) if row.seconds and row.length >= start}
    found = []
    for length, seconds in mine.items():
        times = [
            (row.seconds, name)
            for name, group in contenders.items()
            if name != AUTO and (others is None or name in others)
            for row in group
            if row.length == length and row.seconds
        ]
        if times:
            best, name = min(times)
            found.append((seconds / best, length, name))
    return max(found, default=None)


def draw(rows: Sequence[Row], file: Path) -> None:
    """Time against length on logarithmic axes, a panel for each case and pass."""
    groups = _groups(rows)
    which = list(dict.fromkeys(case for case, _ in groups))
    figure, axes = plotting.figure(len(which), 2, width=4.8, height=2.6)
    names = list(dict.fromkeys(row.contender for row in rows if row.seconds is not None))
    lengths = sorted({row.length for row in rows})
    styles = {
        name: (plotting.COLORS[i % len(plotting.COLORS)], "o^"[i // len(plotting.COLORS)])
        for i, name in enumerate(names)
    }
    for (case, backward), contenders in groups.items():
        ax = axes[which.index(case), int(backward)]
        for name, group in contenders.items():
            points = [(row.length, 1e3 * row.seconds) for row in group if row.seconds is not None]
            if points:
                color, marker = styles[name]
                width = 2.4 if name == AUTO else 1.2
                ax.loglog(*zip(*points, strict=True), marker + "-", color=color, lw=width, ms=4, label=name)
        ax.set_title(f"{cases.CASES[case]}: {PASSES[backward]}", fontsize=9)
        ax.set_ylabel("ms a call", fontsize=9)
        ax.set_xscale("log")
        ax.set_xticks(lengths, [str(length) for length in lengths])
        ax.minorticks_off()
        if ax.lines:
            ax.legend(frameon=False, fontsize=6)
        if case == which[-1]:
            ax.set_xlabel("length", fontsize=9)
    for ax in axes.flat:
        ax.set_visible(bool(ax.lines))
    plotting.save(figure, file)


def start_workers(
    device: Device, folder: Path | None, log: Path, patience: float
) -> tuple[dict[str, Worker], list[str]]:
    """Workers by contender, and what is left out with the reason. Ours share one process."""
    setting = SETTINGS[device]
    own = Local() if device == "interpret" else Process(Path(sys.executable), "", log, patience)
    workers: dict[str, Worker] = dict.fromkeys(setting.contenders, own)
    absent = []
    for name, peer in PEERS.items():
        if device not in peer.platforms:
            on = ", ".join(peer.platforms)
            reason = f"it is timed on {on} only"
        elif folder is None:
            reason = "--peers names no folder"
        else:
            try:
                workers[name] = Process(environment(name, folder), name, log, patience)
                continue
            except NotImplementedError as error:
                reason = str(error)
        absent.append(f"- {name}: {reason}")
    absent += [f"- {name}: {reason}" for name, reason in LEFT_OUT.items()]
    return workers, absent


def main(
    device: Device = "cpu",
    which: tuple[str, ...] = tuple(cases.CASES),
    lengths: tuple[int, ...] = (),
    repeats: int = 7,
    peers: Path | None = None,
    memory_gib: float = 4.0,
    slowest: float = 1.5,
    patience: float = 300.0,
    out: Path | None = None,
    figure: Path | None = None,
    clock: Clock = "wall",
    numerics: bool = False,
) -> None:
    """Print the tables.

    Args:
        device: what to time on.
        which: cases, all if left out.
        lengths: those of the device if left out.
        repeats: samples of each contender in each cell.
        peers: folder of the peers' virtual environments.
        memory_gib: most temporary memory that a contender may need.
        slowest: seconds of one call after which a contender is not run at greater lengths.
        patience: seconds to wait for a contender to compile and run once.
        out: file for all rows, as JSON; cells that are in it already are not timed again.
        figure: file for the figure.
        clock: "wall", or "process" for the time that all threads of the contender's process have run, which tells more
            where others use the machine.
        numerics: print errors against float64 instead.
    """
    if unknown := set(which) - set(cases.CASES):
        raise ValueError(f"main: which has {sorted(unknown)}, expected some of {list(cases.CASES)}")
    if numerics:
        print(errors.table(errors.measure(which)))
        return
    setting = SETTINGS[device]
    lengths = lengths or setting.lengths
    if device == "gpu" and jax.default_backend() != "gpu":
        print(f"no GPU here, JAX runs on {jax.default_backend()}. Not measured:")
        names = [*setting.contenders, *(name for name, peer in PEERS.items() if "gpu" in peer.platforms)]
        print(f"- {', '.join(names)} on {', '.join(which)}, bfloat16, lengths {', '.join(map(str, lengths))}")
        return
    # Processes share the card.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    rows = [] if out is None or not out.exists() else [Row(**row) for row in json.loads(out.read_text())]
    with tempfile.TemporaryDirectory() as scratch:
        workers, absent = start_workers(device, peers, Path(scratch) / "log", patience)
        try:
            most = memory_gib * 2**30
            for cell in measure(device, workers, which, lengths, repeats, most, slowest, rows):
                rows += cell
                brief = ", ".join(map(_brief, cell))
                print(f"{cell[0].case}, {PASSES[cell[0].backward]}, {cell[0].length}: {brief}", file=sys.stderr)
                if out is not None:
                    out.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
        finally:
            for worker in set(workers.values()):
                worker.close()
    if clock == "process":
        rows = [replace(row, seconds=row.work) for row in rows]
    print(
        f"{jax.devices()[0].device_kind}, {os.cpu_count()} cores, jax {jax.__version__}, ms by {clock} clock, "
        f"median of {repeats}"
    )
    print(table(rows))
    if device == "cpu":
        print(f"\n{goals(rows)}")
    else:
        print(f"\n{rates(rows, device, *ceilings(setting.narrow, device == 'interpret', repeats))}")
    print(f"\nNot measured:\n{missing(rows)}".rstrip())
    print("\n".join(absent))
    if device == "cpu":
        print("- everything on a GPU: python -m experiments.bench.kernels --device gpu")
    if figure is not None:
        draw(rows, figure)


if __name__ == "__main__":
    tyro.cli(main)
