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
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import tyro

from experiments.bench import cases, kernel_report
from experiments.bench import numerics as errors
from experiments.bench.internal_rl import timed
from experiments.bench.kernel_report import AUTO, PASSES, SCAN, Row
from experiments.bench.peers import LEFT_OUT, PEERS, environment
from experiments.bench.worker import Local, Process, Worker

Device = Literal["cpu", "gpu", "interpret"]
Clock = Literal["wall", "process"]


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
    print(kernel_report.table(rows))
    print(f"\nGrowth, the exponent of time against length:\n{kernel_report.growths(rows)}")
    if device == "cpu":
        print(f"\n{kernel_report.goals(rows)}")
    else:
        peak, copied = ceilings(setting.narrow, device == "interpret", repeats)
        width = 2 if setting.narrow else 4
        print(f"\n{kernel_report.rates(rows, cases.SIZES[setting.sizes], width, peak, copied)}")
    print(f"\nNot measured:\n{kernel_report.missing(rows)}".rstrip())
    print("\n".join(absent))
    if device == "cpu":
        print("- everything on a GPU: python -m experiments.bench.kernels --device gpu")
    if figure is not None:
        kernel_report.draw(rows, figure)


if __name__ == "__main__":
    tyro.cli(main)
