"""Tables and the figure of the kernels' times, from the rows that `experiments.bench.kernels` measures."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from experiments import plotting
from experiments.bench import cases

AUTO, SCAN = "ours auto", "ours reference"
PASSES = {False: "forward", True: "forward+backward"}


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


def growth(rows: Iterable[Row]) -> float | None:
    """Exponent of time against length: slope of the least-squares line through their logarithms.

    Returns None with fewer than three lengths.
    """
    points = [(row.length, row.seconds) for row in rows if row.seconds is not None]
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
    """Milliseconds by length, times those of `auto` in brackets; temporary memory."""
    lengths = sorted({row.length for row in rows})
    head = ["case", "pass", "contender", *map(str, lengths), "temporary MiB"]
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
            last = timed_rows[max(timed_rows)]
            memory = "-" if last.temporary is None else f"{last.temporary / 2**20:.3g} at {last.length}"
            lines.append([case, PASSES[backward], name, *cells, memory])
    return _markdown(lines)


def growths(rows: Sequence[Row]) -> str:
    """The exponent of `growth` by case, pass and contender, with the range of lengths where it is not the whole one."""
    lengths = [row.length for row in rows if row.seconds is not None]
    names = list(dict.fromkeys(row.contender for row in rows if row.seconds is not None))
    names.sort(key=lambda name: name != AUTO)
    lines = [["case", "pass", *names], ["---"] * (2 + len(names))]
    for (case, backward), contenders in _groups(rows).items():
        cells = []
        for name in names:
            group = [row for row in contenders.get(name, []) if row.seconds is not None]
            exponent = growth(group)
            if exponent is None:
                cells.append("-")
                continue
            least, most = min(row.length for row in group), max(row.length for row in group)
            part = "" if (least, most) == (min(lengths), max(lengths)) else f" ({least}-{most})"
            cells.append(f"{exponent:.2f}{part}")
        lines.append([case, PASSES[backward], *cells])
    return _markdown(lines)


def _markdown(lines: Iterable[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def rates(rows: Sequence[Row], sizes: cases.Sizes, width: int, peak: float, copied: float) -> str:
    """Operations and bytes a second that the recurrence itself needs, as shares of the measured ceilings.

    `width` is the size in bytes of inputs that may be narrow, `peak` operations a second of a matrix product, `copied`
    bytes a second of a copy.
    """
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
        moved = cases.traffic(row.case, row.length, sizes, row.backward, width) / row.seconds
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
