"""Memory of a long sequence's gradient: plain, with blocks recomputed, and streamed (`seqmod.stream`), for each mixer.

Figures are temporary memory as the compiler plans it: nothing is run, and machines of a kind agree.

Command: python -m experiments.bench.stream [--length 8192] [--mixers attention rglru]
"""

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import tyro

from seqmod import BackboneConfig, backbone
from seqmod.objectives import categorical_nll
from seqmod.stream import stream_loss


@dataclass(frozen=True)
class Options:
    """A language model of `layers` blocks of width `width`; `chunk` steps at a time are streamed."""

    mixers: tuple[str, ...] = ("attention", "rglru", "mamba", "mamba2", "gla")
    length: int = 8192
    layers: int = 4
    width: int = 64
    vocabulary: int = 4096
    chunk: int = 512


@dataclass(frozen=True)
class Memory:
    """Temporary memory of the gradient of a sum of negative log-likelihoods, in bytes."""

    plain: int
    remat: int
    streamed: int


def measure(mixer: str, options: Options) -> Memory:
    """Compile the three programs for this device, for one sequence."""
    config = BackboneConfig(
        vocabulary=options.vocabulary,
        heads=(("token", options.vocabulary),),
        mixers=(mixer,) * options.layers,
        width=options.width,
        mlp=4 * options.width,
        context=64,
        scan=True,
    )
    params = jax.eval_shape(lambda: backbone.init(jax.random.key(0), config))
    tokens_BL = jax.ShapeDtypeStruct((1, options.length), jnp.int32)

    def nll(outputs, labels):
        return categorical_nll(outputs["token"], labels).sum()

    def whole(params, tokens_BL, config):
        return nll(backbone.apply(params, config, tokens_BL)[0], tokens_BL)

    def temporary(loss) -> int:
        plan = jax.jit(jax.grad(loss)).lower(params, tokens_BL).compile().memory_analysis()
        if plan is None:
            raise NotImplementedError(f"memory: {jax.default_backend()} does not say what a program needs")
        return plan.temp_size_in_bytes

    return Memory(
        plain=temporary(lambda p, t: whole(p, t, config)),
        remat=temporary(lambda p, t: whole(p, t, replace(config, remat=True))),
        streamed=temporary(lambda p, t: stream_loss(p, config, t, t, nll, chunk=options.chunk)),
    )


def main() -> None:
    """Print the table of `seqmod/README.md`."""
    options = tyro.cli(Options, description=__doc__)
    print("| mixer | plain | blocks recomputed (`remat`) | `stream_loss` | plain / streamed |")
    print("| --- | --- | --- | --- | --- |")
    for mixer in options.mixers:
        m = measure(mixer, options)
        cells = [f"{size / 2**20:.0f}" for size in (m.plain, m.remat, m.streamed)]
        print(f"| {' | '.join([mixer, *cells, f'{m.plain / m.streamed:.1f}'])} |", flush=True)


if __name__ == "__main__":
    main()
