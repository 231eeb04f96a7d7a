"""Block sizes of the selective scan."""

from dataclasses import dataclass


@dataclass(frozen=True)
class SelectiveScanBlocks:
    """`chunk` steps between two kept states, `channels` that a program on a TPU runs at most, `unroll` of XLA's token
    loop.

    A longer chunk keeps fewer states (N D numbers each) and recomputes more of them at a time. The GPU kernels have
    sizes of their own.
    """

    chunk: int = 64
    channels: int = 512
    unroll: int = 4

    def __post_init__(self) -> None:
        if min(self.chunk, self.channels, self.unroll) < 1:
            raise ValueError(f"SelectiveScanBlocks: sizes must be positive, got {self}")
