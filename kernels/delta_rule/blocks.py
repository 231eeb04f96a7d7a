"""Block sizes of the delta rule."""

from dataclasses import dataclass


@dataclass(frozen=True)
class DeltaRuleBlocks:
    """`chunk` steps between two kept states, a power of two.

    Work per step grows with chunk + K V / chunk, memory for the kept states with K V / chunk. The GPU kernels have
    sizes of their own.
    """

    chunk: int = 32

    def __post_init__(self) -> None:
        if self.chunk < 1 or self.chunk & (self.chunk - 1):
            raise ValueError(f"DeltaRuleBlocks: chunk is {self.chunk}, expected a power of two")
