"""ABC against the formula with the shares of every prefix written out, and its limit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqmod.mixers import Context, abc
from seqmod.mixers.abc import ABCConfig
from tests.seqmod.mixers.dense import full_attention, join, softmax, split
from tests.seqmod.mixers.family import Case, run, sequence, steps

pytestmark = pytest.mark.usefixtures("quick_compile")

D, H, R, L = 6, 3, 5, 37


def case_of(random_params, *, causal: bool) -> Case:
    config = ABCConfig(width=D, heads=H, slots=R, causal=causal)
    return Case(abc.MIXER, config, random_params(abc.init, config), sequence(2, L, D))


def formula(params, x_LD, source_MD, causal: bool) -> np.ndarray:
    q, _, _ = split(params, x_LD)
    _, k, v = split(params, source_MD)
    a_HMR = np.einsum("MD,DHR->HMR", np.asarray(source_MD, np.float64), np.asarray(params["control"], np.float64))
    y_HLK = np.zeros_like(q)
    for t in range(len(x_LD)):
        past = slice(0, t + 1 if causal else len(source_MD))
        share_HMR = softmax(a_HMR[:, past], axis=1)
        memory_k, memory_v = (share_HMR.swapaxes(1, 2) @ each[:, past] for each in (k, v))
        weights_HR = softmax(np.einsum("HK,HRK->HR", q[:, t], memory_k) / np.sqrt(q.shape[-1]))
        y_HLK[:, t] = np.einsum("HR,HRK->HK", weights_HR, memory_v)
    return join(params, y_HLK)


@pytest.mark.parametrize("causal", [True, False])
def test_it_is_the_formula_over_several_chunks_and_with_holes(random_params, causal):
    case = case_of(random_params, causal=causal)
    np.testing.assert_allclose(
        run(case, case.x_BLD)[1], formula(case.params, case.x_BLD[1], case.x_BLD[1], causal), rtol=1e-4, atol=1e-5
    )
    where = np.sort(np.random.default_rng(3).permutation(L)[:31])
    mask_BL = jnp.zeros((2, L), bool).at[:, where].set(True)
    x_LD = case.x_BLD[1, where]
    got = run(case, jnp.where(mask_BL[..., None], case.x_BLD, 100 * case.x_BLD), mask_BL)[1, where]
    np.testing.assert_allclose(got, formula(case.params, x_LD, x_LD, causal), rtol=1e-4, atol=1e-5)


def test_the_memory_of_a_context(random_params):
    case = case_of(random_params, causal=True)
    context = Context(sequence(2, 7, D, seed=2))
    expected = formula(case.params, case.x_BLD[1], context.x_BMD[1], False)
    np.testing.assert_allclose(run(case, case.x_BLD, None, context)[1], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("order", [1, -1])
def test_exponents_of_all_sizes(random_params, order):
    """Shares far below float32's range, in growing and in falling order."""
    case = case_of(random_params, causal=True)
    size_L = np.logspace(-1, 2, L)[::order]
    x_BLD = case.x_BLD * jnp.asarray(size_L, jnp.float32)[None, :, None]
    expected = formula(case.params, x_BLD[1], x_BLD[1], True)
    tolerance = 1e-4 * np.abs(expected).max()
    np.testing.assert_allclose(run(case, x_BLD)[1], expected, atol=tolerance)
    stepped, _ = steps(case, x_BLD, abc.init_state(case.config, 2, L))
    np.testing.assert_allclose(stepped[1], expected, atol=tolerance)


def test_a_slot_for_every_step_makes_full_attention(random_params):
    n = 5
    config = ABCConfig(width=D, heads=H, slots=n, causal=False)
    params = random_params(abc.init, config)
    # The first n channels say which step it is.
    x_1LD = sequence(1, n, D).at[0, :, :n].set(jnp.eye(n))
    control = jnp.zeros((D, H, n)).at[:n].set(200 * jnp.eye(n)[:, None])
    y_LD = abc.apply(params | {"control": control}, config, x_1LD)[0]
    np.testing.assert_allclose(y_LD, full_attention(params, x_1LD[0]), rtol=1e-4, atol=1e-5)


def test_the_control_starts_as_glorot_s_of_half_the_variance():
    config = ABCConfig(width=48, heads=4, slots=16)
    control = np.asarray(abc.init(jax.random.key(0), config)["control"])
    bound = (6 / (48 + 16)) ** 0.5 / 2**0.5
    assert control.shape == (48, 4, 16)
    assert 0.98 * bound < np.abs(control).max() <= bound
    np.testing.assert_allclose(control.std(), bound / 3**0.5, rtol=0.05)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"heads": 5}, "width 64 is not divisible by heads 5"), ({"slots": 0}, "slots is 0, expected at least 1")],
)
def test_a_bad_config_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        ABCConfig(**arguments)
