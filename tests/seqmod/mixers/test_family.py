"""The contract that every mixer keeps, in every pattern that it says it has."""

from functools import partial
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqmod.mixers import MIXERS, Context, MixerLayer, apply_mixer, mixing_matrix
from tests.seqmod.mixers.family import (
    REACH,
    UNSEEN,
    B,
    Case,
    D,
    H,
    L,
    M,
    build,
    influence,
    names,
    pattern_of,
    run,
    self_patterns,
    sequence,
    steps,
)

pytestmark = pytest.mark.usefixtures("quick_compile")


def label(pair: tuple[str, bool]) -> str:
    return pair[0] + ("" if pair[1] else "-noncausal")


@pytest.fixture(scope="module", params=self_patterns(), ids=label)
def case(request, random_params) -> Case:
    return build(random_params, *request.param)


@pytest.fixture(scope="module", params=names(pattern="causal self"))
def causal(request, random_params) -> Case:
    return build(random_params, request.param, causal=True)


@pytest.fixture(scope="module", params=self_patterns(packs=True), ids=label)
def packing(request, random_params) -> Case:
    return build(random_params, *request.param)


@pytest.fixture(scope="module", params=self_patterns(packs=False), ids=label)
def masking(request, random_params) -> Case:
    return build(random_params, *request.param)


@pytest.fixture(scope="module", params=self_patterns(linear=True), ids=label)
def linear(request, random_params) -> Case:
    return build(random_params, *request.param)


@pytest.fixture(
    scope="module",
    params=[
        (name, pattern)
        for pattern in (True, False)
        for name in names(pattern=("noncausal ", "causal ")[pattern] + "cross")
    ],
    ids=label,
)
def cross(request, random_params) -> Case:
    return build(random_params, *request.param)


def name_of(case: Case) -> str:
    return next(name for name, mixer in MIXERS.items() if mixer is case.mixer)


def is_causal(case: Case) -> bool:
    return "noncausal self" not in case.mixer.patterns or getattr(case.config, "causal", False)


# All


def test_shape_and_dtype(case):
    y_BLD = run(case, case.x_BLD)
    assert (y_BLD.shape, y_BLD.dtype) == ((B, L, D), jnp.float32)
    assert float(jnp.std(y_BLD)) > 0.01


def test_what_a_step_sees(case):
    seen_LL = influence(case)
    reach = REACH.get(name_of(case), L)
    past_LL = np.tril(np.ones((L, L), bool)) & ~np.tril(np.ones((L, L), bool), -reach)
    assert (seen_LL[past_LL] == 0).sum() <= UNSEEN.get(name_of(case), 0)
    assert (seen_LL[np.tril_indices(L, -reach)] == 0).all()
    if is_causal(case):
        assert (seen_LL[np.triu_indices(L, 1)] == 0).all()
    else:
        assert (seen_LL[np.triu_indices(L, 1)] > 0).any()


def test_jit_changes_nothing(case):
    plain = case.mixer.apply(case.params, case.config, case.x_BLD)
    np.testing.assert_allclose(run(case, case.x_BLD), plain, rtol=1e-4, atol=2e-6)


@partial(jax.jit, static_argnums=(0, 1))
def gradients(apply, config, params, x_BLD):
    return jax.grad(lambda params, x_BLD: jnp.square(apply(params, config, x_BLD)).mean(), (0, 1))(params, x_BLD)


@pytest.mark.parametrize("scale", [0.0, 1.0, 1e3])
def test_gradients_are_finite(case, scale):
    grads = gradients(case.mixer.apply, case.config, case.params, scale * case.x_BLD)
    for path, leaf in jax.tree.leaves_with_path(grads):
        name = jax.tree_util.keystr(path)
        assert np.isfinite(leaf).all(), name
        if "fixed" in name:
            assert not np.abs(leaf).max(), name
        elif scale == 1.0:
            assert np.abs(leaf).max() > 0, name


def test_a_row_does_not_depend_on_the_batch(case):
    y_BLD = run(case, case.x_BLD)
    np.testing.assert_allclose(run(case, case.x_BLD[1:])[0], y_BLD[1], rtol=1e-4, atol=2e-6)
    other = run(case, case.x_BLD.at[0].add(3.0))
    np.testing.assert_array_equal(other[1], y_BLD[1])
    assert (other[0] != y_BLD[0]).any()


def test_bfloat16_inputs(case):
    """The output is bfloat16 too, and as near to that of float32 as its 8 bits let expect."""
    x_BLD = case.x_BLD.astype(jnp.bfloat16)
    y_BLD = run(case, x_BLD)
    assert y_BLD.dtype == jnp.bfloat16
    exact = np.asarray(run(case, x_BLD.astype(jnp.float32)))
    error = np.linalg.norm(np.asarray(y_BLD, np.float32) - exact) / np.linalg.norm(exact)
    assert error < 0.05


def test_the_linen_module_is_the_pure_function(case):
    module = MixerLayer(case.mixer, case.config)
    variables = jax.eval_shape(module.init, jax.random.key(0), case.x_BLD)
    assert jax.tree.map(jnp.shape, variables["params"]["mixer"]) == jax.tree.map(jnp.shape, case.params)
    y_BLD = jax.jit(module.apply)({"params": {"mixer": case.params}}, case.x_BLD)
    np.testing.assert_allclose(y_BLD, run(case, case.x_BLD), rtol=1e-5, atol=1e-6)


def test_init_is_finite_and_moves_with_its_key(case):
    one, two = (jax.jit(case.mixer.init, static_argnums=1)(jax.random.key(seed), case.config) for seed in (0, 1))
    for path, leaf in jax.tree.leaves_with_path(one):
        assert np.isfinite(leaf).all(), jax.tree_util.keystr(path)
        assert leaf.dtype in (jnp.float32, jnp.complex64, jnp.int32), jax.tree_util.keystr(path)
    assert any((a != b).any() for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True))


@pytest.mark.parametrize("name", MIXERS)
def test_a_mixer_declares_its_patterns(name):
    mixer = MIXERS[name]
    assert mixer.patterns <= {"causal self", "noncausal self", "causal cross", "noncausal cross"}
    for causal in (True, False):
        if pattern_of(causal) in mixer.patterns:
            config = mixer.config(D, H, 1.0, 20, causal)
            assert isinstance(config, mixer.kind)
            assert hash(config) == hash(mixer.config(D, H, 1.0, 20, causal))
        else:
            with pytest.raises(ValueError, match=f"causal is {causal}"):
                mixer.config(D, H, 1.0, 20, causal)
    has_steps = "causal self" in mixer.patterns
    assert (mixer.init_state is not None, mixer.step is not None) == (has_steps, has_steps)
    if not any(pattern.endswith("cross") for pattern in mixer.patterns):
        config = mixer.config(D, H, 1.0, 20, "causal self" in mixer.patterns)
        with pytest.raises(ValueError, match="a context is given"):
            apply_mixer(mixer, {}, config, jnp.ones((B, L, D)), context=Context(jnp.ones((B, M, D))))


# Causal


def test_a_prefix_gives_the_same(causal):
    y_BLD = run(causal, causal.x_BLD)
    for length in (1, 2, 5):
        np.testing.assert_allclose(run(causal, causal.x_BLD[:, :length]), y_BLD[:, :length], rtol=1e-4, atol=2e-6)


def test_steps_from_a_carried_state_agree_with_the_parallel_form(causal):
    cut = 5
    start_BLD, state = steps(causal, causal.x_BLD[:, :cut], causal.mixer.init_state(causal.config, B, L))
    rest_BLD, _ = steps(causal, causal.x_BLD[:, cut:], state)
    together = jnp.concatenate([start_BLD, rest_BLD], axis=1)
    np.testing.assert_allclose(together, run(causal, causal.x_BLD), rtol=1e-4, atol=3e-6)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_state_keeps_its_shapes_and_dtypes(causal, dtype):
    state = causal.mixer.init_state(causal.config, B, L)
    x_BD = causal.x_BLD[:, 0].astype(dtype)
    y_BD, after = jax.eval_shape(lambda: causal.mixer.step(causal.params, causal.config, x_BD, state))
    assert (y_BD.shape, y_BD.dtype) == ((B, D), dtype)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), after) == jax.tree.map(lambda x: (x.shape, x.dtype), state)


# Segments and padding


def test_segments_are_sequences_of_their_own(packing):
    # Of lengths 1, 2 and 4: shorter and longer than a convolution's kernel less one. An id that comes back is another.
    segment_ids = jnp.array([[2, 5, 5, 2, 2, 2, 2], [4, 4, 4, 4, 1, 1, 6]])
    packed_BLD = run(packing, packing.x_BLD, segment_ids)
    for row, bounds in enumerate(([0, 1, 3, 7], [0, 4, 6, 7])):
        for start, stop in pairwise(bounds):
            alone = run(packing, packing.x_BLD[row : row + 1, start:stop])[0]
            np.testing.assert_allclose(packed_BLD[row, start:stop], alone, rtol=1e-4, atol=3e-6)
    segment_L = np.array([0, 1, 1, 2, 2, 2, 2])
    seen_LL = influence(packing, segment_ids[:1])
    assert (seen_LL[segment_L[:, None] != segment_L[None]] == 0).all()


@pytest.mark.parametrize("length", [1, 2, L])
def test_one_segment_is_no_segments_however_short(packing, length):
    x_BLD = packing.x_BLD[:, :length]
    one = run(packing, x_BLD, jnp.full((B, length), 3))
    assert one.shape == x_BLD.shape
    np.testing.assert_allclose(one, run(packing, x_BLD), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(masking, side):
    valid = 4
    where = slice(0, valid) if side == "right" else slice(L - valid, L)
    mask_BL = jnp.zeros((B, L), bool).at[:, where].set(True)
    # What lies in the padding must not matter, however large.
    x_BLD = jnp.where(mask_BL[..., None], masking.x_BLD, 100 * masking.x_BLD)
    alone = run(masking, masking.x_BLD[:, where])
    np.testing.assert_allclose(run(masking, x_BLD, mask_BL)[:, where], alone, rtol=1e-4, atol=3e-6)
    seen_LL = influence(masking._replace(x_BLD=x_BLD), mask_BL[:1])
    assert (seen_LL[where][:, ~np.asarray(mask_BL[0])] == 0).all()


def test_a_full_mask_is_no_mask(masking):
    # One operation at a time: two programs would round differently.
    apply = partial(apply_mixer, masking.mixer, masking.params, masking.config, masking.x_BLD)
    np.testing.assert_allclose(apply(mask_BL=jnp.ones((B, L), bool)), apply(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", names(packs=False))
def test_packed_sequences_are_refused(name):
    mixer = MIXERS[name]
    config = mixer.config(D, H, 1.0, 20, "causal self" in mixer.patterns)
    with pytest.raises(ValueError, match="cannot keep packed sequences apart"):
        apply_mixer(mixer, {}, config, jnp.ones((B, L, D)), segment_ids=jnp.zeros((B, L), jnp.int32))


# Linear maps of values


def test_the_matrix_is_the_mixer(linear):
    """Values through the dense matrix, which is written down from the definition, give the mixer's output."""
    parts, params, config, x_BLD = linear.mixer.linear, linear.params, linear.config, linear.x_BLD
    ids_BL = jnp.array([[2, 5, 5, 2, 2, 2, 2], [4, 4, 4, 4, 1, 1, 6]]) if linear.mixer.packs else None

    @jax.jit
    def dense(params, segments):
        m_BHLM = parts.matrix(params, config, x_BLD, segments)
        y_BLHV = jnp.einsum("BHLM,BMHV->BLHV", m_BHLM, parts.values(params, config, x_BLD, segments))
        return parts.read_out(params, config, x_BLD, y_BLHV), m_BHLM

    for segments in (None, ids_BL):
        y_BLD, m_BHLM = dense(params, segments)
        assert m_BHLM.shape[0] == B
        assert m_BHLM.shape[2:] == (L, L)
        np.testing.assert_allclose(y_BLD, run(linear, x_BLD, segments), rtol=1e-4, atol=3e-6)
        if is_causal(linear):
            assert (np.triu(np.asarray(m_BHLM), 1) == 0).all()
    public = mixing_matrix(linear.mixer, params, config, x_BLD)
    np.testing.assert_allclose(public, parts.matrix(params, config, x_BLD, None), rtol=1e-4, atol=3e-6)


# Cross


def test_cross_attention_reads_the_context(cross):
    context = Context(sequence(B, M, D, seed=2))
    y_BLD = run(cross, cross.x_BLD, None, context)
    assert y_BLD.shape == (B, L, D)
    assert (run(cross, cross.x_BLD, None, Context(context.x_BMD.at[:, -1].add(1.0))) != y_BLD).any(-1).all()
    # As many valid steps, and more of anything that is masked.
    segments = jnp.zeros((B, M), jnp.int32).at[:, 3:].set(1) if cross.mixer.packs else jnp.arange(M)[None] < 3
    queries = jnp.zeros((B, L), jnp.int32) if cross.mixer.packs else None
    masked = run(cross, cross.x_BLD, queries, Context(context.x_BMD, jnp.broadcast_to(segments, (B, M))))
    alone = run(cross, cross.x_BLD, None, Context(context.x_BMD[:, :3]))
    np.testing.assert_allclose(masked, alone, rtol=1e-4, atol=3e-6)


@pytest.mark.parametrize("name", names(pattern="causal cross"))
def test_causal_cross_attention_sees_no_later_query(name, random_params):
    case = build(random_params, name, causal=True)
    context = Context(sequence(B, M, D, seed=2))
    y_BLD = run(case, case.x_BLD, None, context)
    np.testing.assert_allclose(run(case, case.x_BLD[:, :4], None, context), y_BLD[:, :4], rtol=1e-4, atol=3e-6)
