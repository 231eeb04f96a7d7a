"""Long-short attention against the formula, one query at a time, at lengths of several chunks and windows."""

import jax.numpy as jnp
import numpy as np
import pytest

from seqmod.mixers import longshort
from seqmod.mixers.longshort import LongShortConfig
from tests.seqmod.mixers.dense import join, softmax, split
from tests.seqmod.mixers.family import Case, run, sequence, steps

pytestmark = pytest.mark.usefixtures("quick_compile")

D, H, L = 6, 3, 17
CAUSAL = [(5, 2, 3), (4, 1, 4), (3, 0, 7)]
NONCAUSAL = [(4, 3), (5, 2), (1, 2), (6, 0)]


def case_of(random_params, **arguments) -> Case:
    config = LongShortConfig(width=D, heads=H, **arguments)
    return Case(longshort.MIXER, config, random_params(longshort.init, config), sequence(2, L, D))


def parameters(params, *names: str) -> list[np.ndarray]:
    return [np.asarray(params[name], np.float64) for name in names]


def norm(params, x_HLK: np.ndarray) -> np.ndarray:
    """Layer norm over all heads at once, (H, L, K)."""
    gain, bias = parameters(params, "gain", "bias")
    mean, var = x_HLK.mean((0, 2), keepdims=True), x_HLK.var((0, 2), keepdims=True)
    return (x_HLK - mean) / np.sqrt(var + 1e-5) * gain[:, None] + bias[:, None]


def wave(position: int) -> np.ndarray:
    angles = position / 10000 ** (np.arange(0, D, 2) / D)
    return np.concatenate([np.sin(angles), np.cos(angles)])


def causal_formula(params, config: LongShortConfig, x_LD) -> np.ndarray:
    """Each query's keys, values and position terms in lists: the window, then the slots of earlier chunks."""
    q, k, v = split(params, x_LD)
    near_k, near_v = (norm(params["window_norm"], each) for each in (k, v))
    slots, by_lag, by_slot, by_slot_bias, content, position = parameters(
        params,
        "slots",
        "window_position",
        "memory_position",
        "memory_position_bias",
        "content_bias",
        "position_bias",
    )
    logits_HLR = np.einsum("LD,DHR->HLR", np.asarray(x_LD, np.float64), slots)
    W, R, C, n = config.window, config.rank, config.chunk, len(x_LD)
    memory = []
    for i in range(n // C):
        share = softmax(logits_HLR[:, i * C : (i + 1) * C], axis=1).swapaxes(1, 2)
        chunk = [share @ each[:, i * C : (i + 1) * C] for each in (k, v)]
        memory.append([norm(params["memory_norm"], each) for each in chunk])
    y_HLK = np.zeros_like(q)
    for h in range(H):
        for t in range(n):
            query = q[h, t] / np.sqrt(q.shape[-1])
            scores, values = [], []
            for s in range(max(0, t - W + 1), t + 1):
                relative = np.einsum("D,DK->K", wave(t - s), by_lag[:, h])
                scores.append((query + content[h]) @ near_k[h, s] + (query + position[h]) @ relative)
                values.append(near_v[h, s])
            for i in range(t // C):
                for r in range(R):
                    # Slots are counted back from the last of the query's own chunk.
                    back = (t // C + 1) * R - 1 - (i * R + r)
                    relative = np.einsum("D,DK->K", wave(back), by_slot[:, h]) + by_slot_bias[h]
                    scores.append(query @ (memory[i][0][h, r] + relative))
                    values.append(memory[i][1][h, r])
            y_HLK[h, t] = softmax(np.array(scores)) @ np.array(values)
    return join(params, y_HLK)


def noncausal_formula(params, config: LongShortConfig, x_LD) -> np.ndarray:
    q, k, v = split(params, x_LD)
    k, v = (norm(params["window_norm"], each) for each in (k, v))
    (slots,) = parameters(params, "slots")
    share_HRL = softmax(np.einsum("LD,DHR->HRL", np.asarray(x_LD, np.float64), slots))
    far_k, far_v = (norm(params["memory_norm"], share_HRL @ each) for each in (k, v))
    W, n = config.window, len(x_LD)
    y_HLK = np.zeros_like(q)
    for h in range(H):
        for t in range(n):
            start = t // W * W
            near = slice(max(0, start - W // 2), min(n, start + W + W // 2))
            keys, values = np.concatenate([k[h, near], far_k[h]]), np.concatenate([v[h, near], far_v[h]])
            y_HLK[h, t] = softmax(keys @ q[h, t] / np.sqrt(q.shape[-1])) @ values
    return join(params, y_HLK)


@pytest.mark.parametrize(("window", "rank", "chunk"), CAUSAL)
def test_the_causal_form_is_the_formula_at_every_length(random_params, window, rank, chunk):
    """So that a prefix gives the same; without slots it is attention to the window."""
    case = case_of(random_params, window=window, rank=rank, chunk=chunk)
    expected = causal_formula(case.params, case.config, case.x_BLD[1])
    for length in (1, 6, 17):
        y_BLD = run(case, case.x_BLD[:, :length])
        np.testing.assert_allclose(y_BLD[1], expected[:length], rtol=1e-4, atol=1e-5)
    half_BLD, state = steps(case, case.x_BLD[:, :8], longshort.init_state(case.config, 2, L))
    rest_BLD, _ = steps(case, case.x_BLD[:, 8:], state)
    np.testing.assert_allclose(np.concatenate([half_BLD, rest_BLD], axis=1)[1], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("window", "rank"), NONCAUSAL)
def test_the_noncausal_form_is_the_formula(random_params, window, rank):
    """Without slots it is attention to the window alone."""
    case = case_of(random_params, window=window, rank=rank, causal=False)
    expected = noncausal_formula(case.params, case.config, case.x_BLD[1])
    np.testing.assert_allclose(run(case, case.x_BLD)[1], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("causal", [True, False])
def test_blocks_and_chunks_count_valid_steps(random_params, causal):
    case = case_of(random_params, window=4, rank=2, chunk=3, causal=causal)
    where = np.sort(np.random.default_rng(3).permutation(L)[:13])
    mask_BL = jnp.zeros((2, L), bool).at[:, where].set(True)
    formula = causal_formula if causal else noncausal_formula
    expected = formula(case.params, case.config, case.x_BLD[1, where])
    got = run(case, jnp.where(mask_BL[..., None], case.x_BLD, 100 * case.x_BLD), mask_BL)[1, where]
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)


def test_nothing_precedes_the_first_step(random_params):
    """Slots of an empty past would take a share of the first softmax: it reads its own value alone."""
    case = case_of(random_params, window=5, rank=2, chunk=3)
    _, _, v = split(case.params, case.x_BLD[1, :1])
    first = join(case.params, norm(case.params["window_norm"], v))
    np.testing.assert_allclose(run(case, case.x_BLD)[1, :1], first, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"heads": 5}, "width 64 is not divisible by heads 5"),
        ({"window": 0}, "window is 0, expected at least 1"),
        ({"rank": -1}, "rank is -1, expected at least 0"),
        ({"window": 7, "chunk": 8}, "window is 7, expected at least the chunk of 8"),
    ],
)
def test_a_bad_config_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        LongShortConfig(**arguments)
