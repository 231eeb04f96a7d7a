"""Command line of training: `python -m experiments.train_rl --env CartPole-v1 --algo ppo --help`."""

import sys
import time
from typing import Any

import jax

from experiments.runner import RunDirectory, RunError, clean_exit
from experiments.train_rl.data import prepare
from experiments.train_rl.load import DATA
from experiments.train_rl.presets import preset
from experiments.train_rl.results import conclude
from experiments.train_rl.settings import parse, plan
from experiments.train_rl.training import train


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Run the experiment; returns what result.json holds."""
    try:
        return _run(sys.argv[1:] if arguments is None else arguments)
    except KeyboardInterrupt:  # outside of training, which saves and says so
        print("\nstopped; what a checkpoint has can be gone on with by --resume", file=sys.stderr)
        raise SystemExit(130) from None


def _run(arguments: list[str]) -> dict[str, Any]:
    try:
        options = parse(arguments)
        settings = options.settings
        planned = plan(settings)
        data = prepare(options)
    except (ValueError, RunError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    with clean_exit():
        begun = time.monotonic()
        run = RunDirectory.open(options.out, settings.to_json(), options.resume)
        if data is not None and not run.is_done(DATA):
            run.stage_done(DATA, arrays=data._asdict())
        source = preset(settings.env, settings.algo).source if settings.preset == "standard" else "tiny"
        print(
            f"{settings.algo} in {settings.env}, {settings.seeds} seeds of {planned.steps:,} {planned.unit}, "
            f"on {jax.devices()[0].device_kind}: {run.path}\ndefaults: {source}"
        )
        result = conclude(run, settings, planned, train(run, settings, planned, data), data)
        print(f"done in {time.monotonic() - begun:.0f} s")
        return result


if __name__ == "__main__":
    main()
