"""Time and memory of every mixer against the length of the sequence, and one step of decoding.

"Forward" is a mixer's output alone, "forward+backward" its gradients of parameters and input, "step" one token from the
state of a sequence of that length. Temporary memory is what the compiler plans for beside inputs and results, and does
not depend on the machine's load. A mixer is not run at lengths where that exceeds `--memory-gib`, nor beyond the length
at which a call took `--slowest` seconds. The efficiency length (Zhang et al., arXiv 2210.07661) is where a parabola
through softmax attention's points and a line through the mixer's intersect: from there on the mixer is ahead.

Command: python -m experiments.bench.mixers [--lengths N ...] [--out FILE.json] [--figure FILE.png]
A run that was cut short goes on with the same `--out`.
"""

import json
import math
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from experiments import plotting
from experiments.bench.internal_rl import timed
from experiments.report import markdown_table
from seqmod.mixers import MIXERS, Mixer

PASSES = ("forward", "forward+backward", "step")


@dataclass(frozen=True)
class Row:
    """One mixer at one length: median seconds a call, temporary bytes, or the reason why there are none."""

    mixer: str
    causal: bool
    run: str
    length: int
    seconds: float | None = None
    temporary: int | None = None
    reason: str = ""


def programs(mixer: Mixer, config: Any, batch: int, length: int) -> dict[str, tuple[Any, tuple[Any, ...]]]:
    """Each pass of a mixer as a function and the shapes of its arguments."""
    params = jax.eval_shape(lambda: mixer.init(jax.random.key(0), config))
    x_BLD = jax.ShapeDtypeStruct((batch, length, config.width), jnp.float32)

    def forward(params: Any, x_BLD: jax.Array) -> jax.Array:
        return mixer.apply(params, config, x_BLD)

    found: dict[str, tuple[Any, tuple[Any, ...]]] = {
        "forward": (forward, (params, x_BLD)),
        "forward+backward": (
            jax.grad(lambda params, x_BLD: jnp.square(forward(params, x_BLD)).sum(), (0, 1)),
            (params, x_BLD),
        ),
    }
    init_state, step = mixer.init_state, mixer.step
    if init_state is not None and step is not None and getattr(config, "causal", True):
        state = jax.eval_shape(lambda: init_state(config, batch, length))
        x_BD = jax.ShapeDtypeStruct((batch, config.width), jnp.float32)
        found["step"] = (lambda params, x_BD, state: step(params, config, x_BD, state), (params, x_BD, state))
    return found


def measure(
    names: Sequence[tuple[str, bool]],
    lengths: Sequence[int],
    *,
    width: int,
    heads: int,
    batch: int,
    repeats: int,
    most_bytes: float,
    slowest: float,
    known: Sequence[Row] = (),
) -> Iterator[Row]:
    """Rows of every (mixer, causal), pass and length but the `known` ones."""
    have = {(row.mixer, row.causal, row.run, row.length): row for row in known}
    for name, causal in names:
        mixer = MIXERS[name]
        stopped: dict[str, str] = {}
        for length in lengths:
            config = mixer.config(width, heads, 1.0, length, causal)
            for run, (function, shapes) in programs(mixer, config, batch, length).items():
                row = have.get((name, causal, run, length))
                if row is None:
                    row = Row(name, causal, run, length, reason=stopped.get(run, ""))
                    if not row.reason:
                        row = _run(row, mixer, config, function, shapes, repeats, most_bytes)
                    yield row
                if row.seconds is not None and row.seconds > slowest:
                    stopped[run] = f"a call took {row.seconds:.1f} s at length {length}"
                elif row.reason:
                    stopped.setdefault(run, row.reason)


def _run(row: Row, mixer: Mixer, config: Any, function, shapes, repeats: int, most_bytes: float) -> Row:
    compiled = jax.jit(function).lower(*shapes).compile()
    analysis = compiled.memory_analysis()
    assert analysis is not None  # XLA has one on every platform
    row = replace(row, temporary=analysis.temp_size_in_bytes)
    if analysis.temp_size_in_bytes > most_bytes:
        return replace(row, reason=f"needs {analysis.temp_size_in_bytes / 2**30:.1f} GiB at length {row.length}")
    k_params, k_x = jax.random.split(jax.random.key(0))
    _, x_shape, *rest = shapes
    arguments = [jax.jit(mixer.init, static_argnums=1)(k_params, config), jax.random.normal(k_x, x_shape.shape)]
    # A step's time does not depend on what is in the state, but the state has the size of the whole sequence.
    arguments += [jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), state) for state in rest]
    return replace(row, seconds=timed(lambda: compiled(*arguments), repeats))


def exponent(rows: Sequence[Row], of: str = "seconds") -> float | None:
    """Slope of a line through the logarithms of time, or temporary memory, and length; None with under three points."""
    points = [(row.length, getattr(row, of)) for row in rows if getattr(row, of)]
    if len(points) < 3:
        return None
    lengths, values = np.log(np.array(points, float)).T
    return float(np.polyfit(lengths, values, 1)[0])


def efficiency_length(attention: Sequence[Row], mixer: Sequence[Row], of: str = "seconds") -> float | None:
    """Length from which the mixer is ahead: where a parabola through attention's points, without a constant below 0,
    meets a line through the mixer's. 0 if the mixer is ahead throughout, None if it never is or points are missing.
    """
    curves = []
    for rows, degree in ((attention, 2), (mixer, 1)):
        points = np.array([(row.length, getattr(row, of)) for row in rows if getattr(row, of) is not None], float)
        if len(points) < 3:
            return None
        # Relative errors count: the shortest sequence weighs as much as the longest.
        curves.append(np.polyfit(points[:, 0], points[:, 1], degree, w=1 / points[:, 1]))
    difference = np.polysub(*curves)  # attention less mixer
    if difference[0] <= 0:
        return None
    roots = [root.real for root in np.roots(difference) if abs(root.imag) < 1e-9 and root.real > 0]
    return float(max(roots)) if roots else 0.0


def table(rows: Sequence[Row]) -> str:
    """A Markdown table: milliseconds by pass and length, exponents, and efficiency lengths against attention."""
    lengths = sorted({row.length for row in rows})
    head = ["mixer", "pass", *(f"{length:,}" for length in lengths), "exponent", "MiB at the end", "memory exponent"]
    head += ["efficiency length, time", "memory"]
    lines = []
    for name, causal in dict.fromkeys((row.mixer, row.causal) for row in rows):
        for run in PASSES:
            own = {row.length: row for row in rows if (row.mixer, row.causal, row.run) == (name, causal, run)}
            if not own:
                continue
            attention = [row for row in rows if (row.mixer, row.causal, row.run) == ("attention", causal, run)]
            cells = [name + ("" if causal else ", bidirectional"), run]
            for length in lengths:
                seconds = own[length].seconds if length in own else None
                cells.append("-" if seconds is None else f"{1e3 * seconds:.3g}")
            last = max((row for row in own.values() if row.temporary is not None), key=lambda row: row.length)
            cells += [_number(exponent(list(own.values()))), f"{(last.temporary or 0) / 2**20:.1f}"]
            cells += [_number(exponent(list(own.values()), "temporary"))]
            if run == "step" or name == "attention":
                cells += ["", ""]
            else:
                cells += [
                    _number(efficiency_length(attention, list(own.values()), of), "{:,.0f}")
                    for of in ("seconds", "temporary")
                ]
            lines.append(cells)
    return markdown_table(head, lines)


def _number(value: float | None, form: str = "{:.2f}") -> str:
    return "-" if value is None or not math.isfinite(value) else form.format(value)


def missing(rows: Sequence[Row]) -> str:
    """What was not measured, and why."""
    reasons: dict[tuple[str, bool, str], str] = {}
    for row in rows:
        if row.reason:
            reasons.setdefault((row.mixer, row.causal, row.run), row.reason)
    names = {True: "", False: ", bidirectional"}
    return "\n".join(f"- {name}{names[causal]}, {run}: {why}" for (name, causal, run), why in reasons.items())


def draw(rows: Sequence[Row], path: Path) -> Path:
    """Time and memory against length, a line a mixer, attention in black."""
    panels = [
        (causal, run, of)
        for causal in (True, False)
        for run, of in zip(
            ("forward", "forward+backward", "forward+backward"), ("seconds", "seconds", "temporary"), strict=True
        )
    ]
    fig, axes = plotting.figure(2, 3, width=5.0, height=4.6)
    for ax, (causal, run, of) in zip(axes.flat, panels, strict=True):
        for index, name in enumerate(dict.fromkeys(row.mixer for row in rows if row.causal == causal)):
            own = [row for row in rows if (row.mixer, row.causal, row.run) == (name, causal, run)]
            points = [(row.length, getattr(row, of)) for row in own if getattr(row, of)]
            if not points:
                continue
            x, y = np.array(points, float).T
            black = name == "attention"
            style = {"color": "black", "linewidth": 2.5} if black else {"color": plotting.COLORS[index % 6]}
            dashes = "solid" if black else ("solid", "dashed", "dotted", "dashdot")[index // 6 % 4]
            ax.plot(x, y * (1e3 if of == "seconds" else 2**-20), marker=".", linestyle=dashes, label=name, **style)
        ax.set_xscale("log", base=2)
        ax.set_yscale("log")
        ax.set_title(f"{run}, {'causal' if causal else 'bidirectional'}", fontsize=10)
        ax.set_ylabel("ms a call" if of == "seconds" else "temporary MiB", fontsize=9)
        ax.legend(frameon=False, fontsize=6, ncols=2)
    for ax in axes[-1]:
        ax.set_xlabel("length", fontsize=9)
    return plotting.save(fig, path)


def main(
    mixers: tuple[str, ...] = tuple(MIXERS),
    lengths: tuple[int, ...] = (256, 1024, 4096, 16384),
    width: int = 256,
    heads: int = 4,
    batch: int = 1,
    repeats: int = 5,
    memory_gib: float = 4.0,
    slowest: float = 1.0,
    out: Path | None = None,
    figure: Path | None = None,
) -> list[Row]:
    """Print the table.

    Args:
        mixers: those of MIXERS, each in every direction it has.
        lengths: of the sequence.
        width: of the model.
        heads: of each mixer.
        batch: sequences in a batch.
        repeats: samples of each call.
        memory_gib: most temporary memory that a program may need.
        slowest: seconds of one call after which a mixer is not run at greater lengths.
        out: file for all rows, as JSON; rows that are in it already are not measured again.
        figure: file for the figure.
    """
    rows = [Row(**row) for row in json.loads(out.read_text())] if out is not None and out.exists() else []
    names = [
        (name, causal)
        for causal in (True, False)
        for name in mixers
        if ("causal self" if causal else "noncausal self") in MIXERS[name].patterns
    ]
    measured = measure(
        names,
        lengths,
        width=width,
        heads=heads,
        batch=batch,
        repeats=repeats,
        most_bytes=memory_gib * 2**30,
        slowest=slowest,
        known=rows,
    )
    for row in measured:
        rows.append(row)
        took = row.reason if row.seconds is None else f"{1e3 * row.seconds:.2f} ms"
        print(f"{row.mixer}, {row.run}, {row.length:,}: {took}", file=sys.stderr)
        if out is not None:
            partial = out.with_name(out.name + ".partial")
            partial.write_text(json.dumps([asdict(row) for row in rows]))
            os.replace(partial, out)
    device = jax.devices()[0].device_kind
    print(f"Milliseconds, float32, batch {batch}, width {width}, {heads} heads, on {device}.\n\n{table(rows)}")
    if left_out := missing(rows):
        print(f"\nNot measured:\n{left_out}")
    if figure is not None:
        draw(rows, figure)
    return rows


if __name__ == "__main__":
    tyro.cli(main)
