"""Settings that every test runs under; the environment is set before JAX is first imported."""

import itertools
import os
from collections.abc import Callable, Iterator
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
CACHE = ROOT / ".cache"

os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(CACHE / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")
# Simulated devices, for what is sharded; in the environment, for processes that tests start.
os.environ.setdefault("JAX_NUM_CPU_DEVICES", "2")
# XLA sizes its CPU thread pool by this: with the two threads of a small machine, simulated
# devices can wait for each other forever.
os.environ.setdefault("NPROC", "32")
# With an empty cache most of the time is compilation, and most of that XLA's MLIR emitters and optimisations of machine
# code. Neither changes what a program means, nor its memory. An empty XLA_FLAGS gives the usual compiler.
if not entry_points(group="jax_plugins"):  # no accelerator
    os.environ.setdefault(
        "XLA_FLAGS",
        "--xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters"
        " --xla_cpu_parallel_codegen_split_count=1 --xla_backend_optimization_level=1",
    )
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault("HYPOTHESIS_STORAGE_DIRECTORY", str(CACHE / "hypothesis"))

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest

# Brax breaks the first of these: code that runs it wraps it in `jax.numpy_rank_promotion("allow")`.
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_debug_key_reuse", True)

# An example's time is mostly compilation, so deadlines mean nothing; the same examples every time.
hypothesis.settings.register_profile("repository", deadline=None, derandomize=True, max_examples=25, print_blob=True)
hypothesis.settings.load_profile("repository")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips what is marked for an accelerator that this machine lacks; the notebooks come first, as each takes long: at
    the end one worker would wait for the other."""
    items.sort(key=lambda item: item.path.name != "test_notebooks.py")
    for platform in ("gpu", "tpu"):
        marked = [item for item in items if item.get_closest_marker(platform)]
        if marked and jax.default_backend() != platform:
            skip = pytest.mark.skip(reason=f"needs a {platform.upper()}")
            for item in marked:
                item.add_marker(skip)


MAPPINGS = Path("/proc/self/maps")
_count = itertools.count(1)


@pytest.fixture(autouse=True)
def bounded_programs() -> Iterator[None]:
    """Forgets compiled programs before they are too many. Each takes three mappings of memory or more; Linux allows a
    process 65,530 (vm.max_map_count), and where an allocation fails there, XLA crashes."""
    yield
    if next(_count) % 20 == 0 and MAPPINGS.exists():
        with MAPPINGS.open("rb") as mappings:
            many = sum(1 for _ in mappings) > 30_000
        if many:
            jax.clear_caches()


@pytest.fixture(scope="session")
def random_params() -> Callable[..., Any]:
    """`random_params(init, *args)` has the shapes of `init(key, *args)` and noise everywhere: a bias that starts at
    zero or a gain that starts at one would hide that it is used wrongly. It also spares the compilation of `init`."""

    def draw(init: Callable[..., Any], *args: Any, seed: int = 0, scale: float = 0.4) -> Any:
        shapes = jax.eval_shape(lambda: init(jax.random.key(0), *args))
        rng = np.random.default_rng(seed)
        return jax.tree.map(lambda x: jnp.asarray(scale * rng.standard_normal(x.shape), x.dtype), shapes)

    return draw


@pytest.fixture(scope="module")
def quick_compile() -> Iterator[None]:
    """Compiles with few optimisations, for modules whose programs are many and tiny: it saves a third of their time."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)
