"""Local attention: softmax attention to a window of 15 keys, as in the CAB benchmark (Zhang et al., arXiv 2210.07661).

    causal: keys t - w + 1 .. t;   otherwise t - w .. t + w

The mixer is that of `attention`, which works in blocks where a sequence is much longer than the window, so that memory
is linear in the length. Scores have no position bias, as there; any other `AttentionConfig` will do as well.
"""

from seqmod.mixers import attention
from seqmod.mixers.attention import AttentionConfig
from seqmod.mixers.base import check_heads

WINDOW = 15


def default_config(
    width: int, heads: int, init_scale: float = 1.0, context: int = 128, causal: bool = True
) -> AttentionConfig:
    """Heads that share the width, a window of 15; `context` has no meaning here."""
    head_dim = check_heads("local", width, heads)
    return AttentionConfig(
        width=width,
        heads=heads,
        head_dim=head_dim,
        causal=causal,
        position="none",
        window=WINDOW,
        init_scale=init_scale,
    )


MIXER = attention.MIXER._replace(config=default_config, patterns=frozenset({"causal self", "noncausal self"}))
