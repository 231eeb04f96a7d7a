"""The dispatcher picks by name or raises with the reason; segment helpers against loops."""

from itertools import accumulate, pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kernels.dispatch import AUTO, SCANNED_BYTES, auto_for, select
from kernels.segments import flip, pad_length, segment_index, segment_starts

ALL = {name: name for name in ("reference", "chunked", "pallas_tpu", "pallas_gpu")}


def on(monkeypatch, platform):
    monkeypatch.setattr(jax, "default_backend", lambda: platform)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("platform", ["cpu", "gpu", "tpu"])
def test_a_named_implementation_is_taken_on_every_platform(monkeypatch, name, platform):
    on(monkeypatch, platform)
    assert select("op", name, ALL) == name


@pytest.mark.parametrize("platform", ["cpu", "gpu", "tpu"])
def test_auto_runs_no_kernel_that_was_never_timed(monkeypatch, platform):
    on(monkeypatch, platform)
    assert select("op", "auto", ALL) == "chunked"


def test_auto_scans_over_tokens_on_a_cpu_while_the_state_is_small(monkeypatch):
    names = {name: name for name in ("scan", *ALL)}
    for op, most in SCANNED_BYTES.items():
        for platform, state_bytes, name in (("cpu", most, "scan"), ("cpu", most + 4, "chunked"), ("gpu", 4, "chunked")):
            on(monkeypatch, platform)
            assert select(op, "auto", names, auto=auto_for(op, state_bytes)) == name


def test_auto_passes_over_what_is_refused_or_not_there(monkeypatch):
    on(monkeypatch, "gpu")
    order = AUTO | {"gpu": ("pallas_gpu", "chunked")}
    assert select("op", "auto", ALL, auto=order) == "pallas_gpu"
    assert select("op", "auto", ALL, refused={"pallas_gpu": "too wide"}, auto=order) == "chunked"
    assert select("op", "auto", {"reference": "reference"}) == "reference"
    with pytest.raises(
        NotImplementedError, match=r"op: no implementation .* on gpu \(pallas_gpu: too wide; chunked: not"
    ):
        select("op", "auto", {"pallas_gpu": 1}, refused={"pallas_gpu": "too wide"}, auto=order)


def test_auto_on_an_unknown_platform_is_that_of_the_cpu(monkeypatch):
    on(monkeypatch, "other")
    assert select("op", "auto", ALL) == "chunked"


@pytest.mark.parametrize(("platform", "name"), [("gpu", "pallas_gpu"), ("tpu", "pallas_tpu")])
def test_pallas_is_the_kernel_of_the_platform(monkeypatch, platform, name):
    on(monkeypatch, platform)
    assert select("op", "pallas", ALL) == name


def test_pallas_without_a_kernel_for_the_platform_says_so(monkeypatch):
    on(monkeypatch, "cpu")
    with pytest.raises(NotImplementedError, match=r"op: no Pallas kernel for the default platform cpu, .*pallas_tpu"):
        select("op", "pallas", ALL)
    on(monkeypatch, "gpu")
    with pytest.raises(NotImplementedError, match=r"op: no Pallas kernel for the default platform gpu, only \[\]"):
        select("op", "pallas", {"reference": 1})


def test_a_refused_name_raises_the_reason():
    with pytest.raises(NotImplementedError, match="op: implementation 'chunked' can't run this: complex"):
        select("op", "chunked", ALL, refused={"chunked": "complex"})


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(ValueError, match="op: implementation is 'triton', expected one of auto, pallas, reference, ch"):
        select("op", "triton", ALL)


@given(st.lists(st.integers(0, 2), min_size=1, max_size=9))
def test_segments_are_the_runs_of_equal_ids(ids):
    starts = [False] + [now != before for before, now in pairwise(ids)]
    np.testing.assert_array_equal(segment_starts(jnp.array([ids])), [starts])
    np.testing.assert_array_equal(segment_index(jnp.array([ids])), [list(accumulate(starts))])


def test_padding_and_running_order():
    array = jnp.arange(10).reshape(2, 5)
    np.testing.assert_array_equal(pad_length(array, 4), np.pad(array, ((0, 0), (0, 3))))
    np.testing.assert_array_equal(pad_length(array, 4, edge=True)[:, 5:], [[4] * 3, [9] * 3])
    np.testing.assert_array_equal(pad_length(array, 2, axis=0), array)
    np.testing.assert_array_equal(flip(array, True), array[:, ::-1])
    assert flip(array, False) is array
    assert flip(None, True) is None
