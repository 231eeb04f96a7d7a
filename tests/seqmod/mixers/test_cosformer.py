"""cosFormer against its dense formula."""

import jax.numpy as jnp
import numpy as np
import pytest

from seqmod.mixers import Context, cosformer
from seqmod.mixers.cosformer import CosFormerConfig
from tests.seqmod.mixers.dense import join, split
from tests.seqmod.mixers.family import Case, run, sequence

pytestmark = pytest.mark.usefixtures("quick_compile")

D, H, L, M = 12, 3, 11, 13


def case_of(random_params, *, causal: bool) -> Case:
    config = CosFormerConfig(width=D, heads=H, horizon=M, causal=causal)
    return Case(cosformer.MIXER, config, random_params(cosformer.init, config), sequence(2, L, D))


def formula(params, x_LD, source_MD, causal: bool) -> np.ndarray:
    q, _, _ = split(params, x_LD)
    _, k, v = split(params, source_MD)
    lag_LM = np.arange(len(x_LD))[:, None] - np.arange(len(source_MD))[None]
    m_HLM = np.maximum(q, 0) @ np.maximum(k, 0).swapaxes(1, 2) * np.cos(np.pi * lag_LM / (2 * M))
    if causal:
        m_HLM = np.tril(m_HLM)
    return join(params, m_HLM @ v / np.maximum(m_HLM.sum(-1, keepdims=True), 1e-6))


@pytest.mark.parametrize("causal", [True, False])
def test_it_is_the_dense_formula(random_params, causal):
    case = case_of(random_params, causal=causal)
    x_LD = case.x_BLD[1]
    np.testing.assert_allclose(run(case, case.x_BLD)[1], formula(case.params, x_LD, x_LD, causal), rtol=1e-4, atol=1e-5)
    context = Context(sequence(2, 7, D, seed=2))
    np.testing.assert_allclose(
        run(case, case.x_BLD, None, context)[1],
        formula(case.params, x_LD, context.x_BMD[1], False),
        rtol=1e-4,
        atol=1e-5,
    )


def test_a_query_without_a_positive_entry_reads_zeros(random_params):
    case = case_of(random_params, causal=True)
    x_BLD = jnp.abs(case.x_BLD)
    negative = case.params | {"qkv": case.params["qkv"].at[:, 0].set(-1)}
    np.testing.assert_array_equal(run(case._replace(params=negative), x_BLD), 0)


def test_queries_read_the_context_of_their_segment(random_params):
    """Times count from the start of each segment, in the context and in the queries."""
    case = case_of(random_params, causal=False)
    context_BMD = sequence(2, 5, D, seed=2)
    ids_BM = jnp.array([[3, 3, 1, 1, 1]] * 2)
    ids_BL = jnp.array([[1] * 4 + [3] * 7] * 2)
    y_BLD = run(case, case.x_BLD, ids_BL, Context(context_BMD, ids_BM))
    for queries, keys in ((slice(0, 4), slice(2, 5)), (slice(4, 11), slice(0, 2))):
        alone = run(case, case.x_BLD[:, queries], None, Context(context_BMD[:, keys]))
        np.testing.assert_allclose(y_BLD[:, queries], alone, rtol=1e-4, atol=3e-6)


def test_sequences_beyond_the_horizon_are_refused(random_params):
    case = case_of(random_params, causal=True)
    message = "a sequence has 14 steps, more than the horizon 13"
    with pytest.raises(ValueError, match=message):
        run(case, sequence(2, 14, D))
    with pytest.raises(ValueError, match=message):
        run(case, case.x_BLD, None, Context(sequence(2, 14, D)))
    with pytest.raises(ValueError, match=message):
        cosformer.init_state(case.config, 2, 14)
    # Of a row with several segments none is that long.
    ids_BL = jnp.repeat(jnp.arange(2), 7)[None]
    row_BLD = run(case, sequence(1, 14, D), ids_BL)
    np.testing.assert_allclose(row_BLD[:, 7:], run(case, sequence(1, 14, D)[:, 7:]), rtol=1e-4, atol=3e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"heads": 5}, "width 64 is not divisible by heads 5"), ({"horizon": 0}, "horizon is 0, expected at least 1")],
)
def test_a_bad_config_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        CosFormerConfig(**arguments)
