"""The RG-LRU block against its equations, one step at a time."""

import math
from dataclasses import replace
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import erf

from seqmod.mixers import RGLRUConfig, rglru
from tests.seqmod.mixers.family import Case, run, sequence, steps

pytestmark = pytest.mark.usefixtures("quick_compile")


def rglru_reference(params, config: RGLRUConfig, x_LD: np.ndarray) -> np.ndarray:
    """The equations of the module's docstring, one step at a time."""
    p = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    size = config.recurrence // config.heads
    bias = {name: p.get(f"{name}_bias", 0.0) for name in ("input", "gate", "out")}
    u_LN, h_N, y_LD = x_LD @ p["input"] + bias["input"], np.zeros(config.recurrence), np.zeros_like(x_LD)
    for t, x_D in enumerate(x_LD):
        conv_N = p["conv_bias"].copy()
        for lag in range(min(config.kernel, t + 1)):
            conv_N += p["conv"][config.kernel - 1 - lag] * u_LN[t - lag]
        r_N, i_N = np.zeros_like(h_N), np.zeros_like(h_N)
        for head in range(config.heads):
            block = slice(head * size, (head + 1) * size)
            for gate, g_N in enumerate((r_N, i_N)):
                logit = conv_N[block] @ p["gates"][gate, head] + p["gates_bias"][gate, block]
                g_N[block] = 1 / (1 + np.exp(-logit))
        a_N = np.exp(-8 * np.log1p(np.exp(p["decay"])) * r_N)
        share_N = np.ones_like(a_N) if config.whole_first and t == 0 else np.sqrt(1 - a_N**2)
        h_N = a_N * h_N + share_N * i_N * conv_N
        branch = x_D @ p["gate"] + bias["gate"]
        gelu = 0.5 * branch * (1 + np.tanh(math.sqrt(2 / math.pi) * (branch + 0.044715 * branch**3)))
        assert np.abs(gelu - 0.5 * branch * (1 + erf(branch / math.sqrt(2)))).max() < 1e-3
        y_LD[t] = (gelu * h_N) @ p["out"] + bias["out"]
    return y_LD


@pytest.mark.parametrize("published", [False, True])
def test_rglru_against_the_equations(random_params, published):
    config = RGLRUConfig(width=5, recurrence=6, heads=3, kernel=4, bias=published, whole_first=published)
    params = random_params(rglru.init, config, scale=0.5)
    x_BLD = sequence(2, 11, 5)
    case = Case(rglru.MIXER, config, params, x_BLD)
    expected = rglru_reference(params, config, np.asarray(x_BLD[1], np.float64))
    np.testing.assert_allclose(run(case, x_BLD)[1], expected, rtol=1e-4, atol=1e-5)


def test_first_steps_of_segments_and_of_states_are_taken_whole(random_params):
    config = RGLRUConfig(width=5, recurrence=6, heads=3, whole_first=True)
    params = random_params(rglru.init, config)
    case = Case(rglru.MIXER, config, params, sequence(2, 7, 5))
    ids_BL = jnp.array([[0, 0, 0, 1, 1, 1, 1], [0, 1, 1, 2, 2, 2, 0]])
    packed = run(case, case.x_BLD, ids_BL)
    for row, bounds in enumerate(([0, 3, 7], [0, 1, 3, 6, 7])):
        for start, stop in pairwise(bounds):
            expected = rglru_reference(params, config, np.asarray(case.x_BLD[row, start:stop], np.float64))
            np.testing.assert_allclose(packed[row, start:stop], expected, rtol=1e-4, atol=1e-5)
    streamed, state = steps(case, case.x_BLD, rglru.init_state(config, 2, 7))
    np.testing.assert_allclose(streamed, run(case, case.x_BLD), rtol=1e-4, atol=3e-6)
    assert not state.first_B.any()
    plain = run(case._replace(config=replace(config, whole_first=False)), case.x_BLD)
    assert (plain[:, 0] != run(case, case.x_BLD)[:, 0]).any()
    # The parts of the linear map do so too.

    @jax.jit
    def dense(params, x_BLD):
        v_BLNV, m_BNLL = (part(params, config, x_BLD, ids_BL) for part in (rglru.values, rglru.matrix))
        return rglru.read_out(params, config, x_BLD, jnp.einsum("BNLM,BMNV->BLNV", m_BNLL, v_BLNV))

    np.testing.assert_allclose(dense(params, case.x_BLD), packed, rtol=1e-4, atol=3e-6)


def test_published_tensors(random_params):
    """Those of a block of ours, laid out as in the `transformers` package."""
    config = RGLRUConfig(width=5, recurrence=6, heads=3, bias=True)
    params = random_params(rglru.init, config)
    tensors = {
        "linear_y.weight": params["gate"].T,
        "linear_x.weight": params["input"].T,
        "linear_out.weight": params["out"].T,
        "linear_y.bias": params["gate_bias"],
        "linear_x.bias": params["input_bias"],
        "linear_out.bias": params["out_bias"],
        "conv_1d.weight": params["conv"].T[:, None],
        "conv_1d.bias": params["conv_bias"],
        "rg_lru.recurrent_param": params["decay"],
        "rg_lru.recurrent_gate_weight": params["gates"][0],
        "rg_lru.recurrent_gate_bias": params["gates_bias"][0].reshape(3, 2),
        "rg_lru.input_gate_weight": params["gates"][1],
        "rg_lru.input_gate_bias": params["gates_bias"][1].reshape(3, 2),
    }
    loaded = rglru.from_published(config, tensors)
    assert set(loaded) == set(params)
    for name, leaf in params.items():
        np.testing.assert_array_equal(loaded[name], leaf, err_msg=name)
    with pytest.raises(ValueError, match="expected bias=True"):
        rglru.from_published(replace(config, bias=False), tensors)
    with pytest.raises(ValueError, match="from_published: tensors become"):
        rglru.from_published(config, tensors | {"linear_out.weight": params["out"]})


def test_rglru_starts_with_slow_decays():
    config = RGLRUConfig(width=3, recurrence=1000, heads=2)
    decay_N = jax.jit(lambda key: rglru.init(key, config)["decay"])(jax.random.key(0))
    decay_N = np.exp(-8 * np.log1p(np.exp(np.asarray(decay_N, np.float64))))
    assert 0.9 <= decay_N.min() < 0.901
    assert 0.998 < decay_N.max() <= 0.9991


def test_rglru_refuses_a_bad_config():
    with pytest.raises(ValueError, match="recurrence 7 is not divisible by heads 2"):
        RGLRUConfig(width=5, recurrence=7, heads=2)
    with pytest.raises(ValueError, match="sizes must be positive"):
        RGLRUConfig(width=5, recurrence=0, heads=2)
