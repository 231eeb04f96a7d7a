"""Fixtures of the kernels' tests."""

from collections.abc import Iterator

import jax
import pytest


@pytest.fixture
def ampere(monkeypatch) -> None:
    """A GPU that is too old for the kernels."""

    class Device:
        compute_capability = "8.0"

    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "devices", lambda: [Device()])


@pytest.fixture
def full_compile() -> Iterator[None]:
    """Compiles with all optimisations, within a module that uses `quick_compile`."""
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)
