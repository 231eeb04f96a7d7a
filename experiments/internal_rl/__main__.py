"""Command line of the internal-RL experiment: `python -m experiments.internal_rl --help`."""

import argparse
import dataclasses
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import jax
import tyro

from experiments.internal_rl import pipeline
from experiments.internal_rl.config import Config
from experiments.internal_rl.presets import PRESETS
from experiments.runner import RunDirectory, clean_exit


@dataclasses.dataclass(frozen=True)
class Options:
    """Internal RL (arXiv 2512.20605). `--preset tiny|small|paper` chooses the defaults shown here."""

    config: Annotated[Config, tyro.conf.arg(name="")]
    out: Path = Path("runs") / "internal_rl"
    """Run directory; must be new or empty without --resume."""
    resume: bool = False
    """Go on with the run in --out."""
    from_scratch: bool = False
    """Train the base model even where a trained one is shipped."""
    stages: tuple[pipeline.Stage, ...] = pipeline.STAGES
    """Stages to run. All need the base model, which is made first if need be; reinforce needs discover."""
    seeds: int | None = None
    """Seeds of reinforcement learning; short for --reinforce.seeds."""


def parse(arguments: list[str]) -> tuple[str, Options]:
    """Preset and options. A wrong value ends the program with a message before anything is compiled."""
    before = argparse.ArgumentParser(add_help=False)
    before.add_argument("--preset", default="small", choices=sorted(PRESETS))
    preset, rest = before.parse_known_args(arguments)
    defaults = Options(config=PRESETS[preset.preset]())
    try:
        options = tyro.cli(Options, args=rest, default=defaults, prog="python -m experiments.internal_rl")
        if options.seeds is not None:
            reinforce = dataclasses.replace(options.config.reinforce, seeds=options.seeds)
            options = dataclasses.replace(options, config=dataclasses.replace(options.config, reinforce=reinforce))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    return preset.preset, options


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Run the experiment; returns what result.json holds."""
    preset, options = parse(sys.argv[1:] if arguments is None else arguments)
    with clean_exit():
        begun = time.monotonic()
        asked = {"preset": preset, "seed": options.config.seed, **dataclasses.asdict(options.config)}
        run = RunDirectory.open(options.out, asked, options.resume)
        print(
            f"internal RL, preset {preset}, seed {options.config.seed}, on {jax.devices()[0].device_kind}: {run.path}"
        )
        result = pipeline.run_stages(run, options.config, options.stages, from_scratch=options.from_scratch)
        print(f"done in {(time.monotonic() - begun) / 60:.1f} minutes")
        return result


if __name__ == "__main__":
    main()
