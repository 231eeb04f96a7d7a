"""Block sizes of linear attention."""

from dataclasses import dataclass


@dataclass(frozen=True)
class LinearAttentionBlocks:
    """Steps in a chunk: `chunk` if decays are per head, `channel_chunk` if they are per channel, where the pairwise
    decays inside a chunk take chunk * K numbers a step. The TPU needs multiples of 8. The GPU kernels for tensor cores
    need a chunk of 64, those that go token by token look at neither."""

    chunk: int = 64
    channel_chunk: int = 8

    def __post_init__(self) -> None:
        if min(self.chunk, self.channel_chunk) < 1 or max(self.chunk, self.channel_chunk) > 256:
            raise ValueError(f"LinearAttentionBlocks: chunks must be in 1..256, got {self}")

    def steps(self, log_decay_ndim: int) -> int:
        """Chunk length for log-decays of that rank, (B, L, H) or (B, L, H, K)."""
        return self.channel_chunk if log_decay_ndim == 4 else self.chunk
