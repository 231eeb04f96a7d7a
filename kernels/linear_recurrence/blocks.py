"""Block sizes of the linear recurrence."""

from dataclasses import dataclass


@dataclass(frozen=True)
class LinearRecurrenceBlocks:
    """What one program of a kernel holds at a time: `steps` of `channels`, which are always 128 on the GPU.

    The XLA forms have no blocks: without a matrix product there is nothing to gain from them.
    """

    steps: int = 64
    channels: int = 512

    def __post_init__(self) -> None:
        if self.steps < 1 or self.channels < 128 or self.channels % 128:
            raise ValueError(
                f"LinearRecurrenceBlocks: expected steps >= 1 and channels in multiples of 128, got {self}"
            )
