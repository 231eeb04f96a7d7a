"""Memory of streamed gradients, as the compiler plans it."""

import pytest

from experiments.bench.stream import Options, measure


@pytest.mark.parametrize("mixer", ["attention", "rglru", "mamba"])
def test_memory_at_length_8192(mixer):
    memory = measure(mixer, Options())
    assert memory.plain > 2.8 * memory.streamed
    assert memory.remat > 1.5 * memory.streamed
