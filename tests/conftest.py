"""Settings that every test runs under; the environment is set before JAX is first imported."""

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CACHE = ROOT / ".cache"

os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(CACHE / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")
# XLA sizes its CPU thread pool by this: with the two threads of a small machine, the eight
# simulated devices of the sharding tests can wait for each other forever.
os.environ.setdefault("NPROC", "32")
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault("HYPOTHESIS_STORAGE_DIRECTORY", str(CACHE / "hypothesis"))

import hypothesis
import jax
import pytest

# Brax breaks the first of these: code that runs it wraps it in `jax.numpy_rank_promotion("allow")`.
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_debug_key_reuse", True)

# An example's time is mostly compilation, so deadlines mean nothing; the same examples every time.
hypothesis.settings.register_profile("repository", deadline=None, derandomize=True, max_examples=25, print_blob=True)
hypothesis.settings.load_profile("repository")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what is marked for an accelerator that this machine lacks."""
    for platform in ("gpu", "tpu"):
        marked = [item for item in items if item.get_closest_marker(platform)]
        if marked and jax.default_backend() != platform:
            skip = pytest.mark.skip(reason=f"needs a {platform.upper()}")
            for item in marked:
                item.add_marker(skip)
