"""A table of finished runs side by side, for instance of base models with different mixers.

The claim of the paper (arXiv 2512.20605) is about autoregressive models at large; its own is a transformer for the grid
world and a recurrence for the ant. What a stage has not measured is left blank.

Command: python -m experiments.internal_rl.compare RUN [RUN ...]
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.report import markdown_table

COLUMNS = (
    "mixer",
    "seed",
    "base NLL",
    "probes, by layer",
    "controllers, by layer",
    "base alone",
    "gate F1",
    "switches per true switch",
    "codes, nats",
    "internal RL",
    "raw-action RL",
    "claims",
)


def row(path: Path) -> list[str]:
    """One run's numbers, as texts. Raises ValueError where there is no finished internal-RL run."""
    try:
        config = json.loads((path / "config.json").read_text())["config"]
        result = json.loads((path / "result.json").read_text())
    except FileNotFoundError as error:
        raise ValueError(f"{path} is no finished run: it has no {Path(error.filename).name}") from None
    if "discover" not in config:
        raise ValueError(f"{path} is a run of another experiment")
    measured = result["measured"]
    gate = measured.get("gate")
    chosen = gate["rows"][config["discover"]["alphas"].index(config["discover"]["chosen"])] if gate else None
    control, codes, final = (measured.get(name) for name in ("control", "codes", "final_success"))
    return [
        config["base"]["mixer"],
        str(config["seed"]),
        f"{gate['base_nll']:.3f}" if gate else "",
        _by_layer(measured.get("probe_accuracy", ())),
        _by_layer(control["success_by_layer"]) if control else "",
        f"{control['raw_success']:.0e}" if control else "",
        f"{chosen['exact']['f1']:.2f}" if chosen else "",
        f"{chosen['exact']['ratio']:.2f}" if chosen else "",
        f"{codes['information']:.2f} of {codes['at_most']:.2f}" if codes else "",
        _spread(final["internal"]) if final else "",
        _spread(final["raw"]) if final else "",
        f"{sum(claim['holds'] for claim in result['claims'])} of {len(result['claims'])}",
    ]


def _by_layer(values: Sequence[float]) -> str:
    return " ".join(f"{value:.2f}".removeprefix("0") for value in values)


def _spread(success: Sequence[float]) -> str:
    low, middle, high = np.quantile(success, [0.25, 0.5, 0.75])
    return f"{middle:.2g} ({low:.2g} to {high:.2g})"


def main(arguments: list[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="python -m experiments.internal_rl.compare", description=_summary())
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="directory of a finished run")
    options = parser.parse_args(arguments)
    try:
        rows: list[Sequence[Any]] = [row(path) for path in options.runs]
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    print(markdown_table(COLUMNS, rows))


def _summary() -> str:
    assert __doc__ is not None
    return __doc__.splitlines()[0]


if __name__ == "__main__":
    main()
