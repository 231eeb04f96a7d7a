"""The swap through a bijection as an edit of a residual stream: exact properties of interventions.

The other operators, and properties that need no bijection, are in test_backbone.py.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqmod import BackboneConfig, Edit, backbone, bijections
from seqmod.bijections import IdentityConfig, OrthogonalConfig, RevNetConfig
from seqmod.residual import apply_edits

pytestmark = pytest.mark.usefixtures("quick_compile")

B, L, F, D = 2, 7, 5, 6
CONFIG = BackboneConfig(
    inputs=F,
    heads=(("action", 4), ("next", 3)),
    mixers=("attention", "rglru"),
    width=D,
    mlp=11,
    attention_heads=2,
    context=20,
)
PHIS = (IdentityConfig(D), OrthogonalConfig(D), RevNetConfig(D, blocks=3, hidden=5))
each_phi = pytest.mark.parametrize("phi", PHIS, ids=lambda phi: type(phi).__name__)
SOME_D = jnp.arange(D) % 2 == 1


def normal(seed: int, *shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


X_BLF = normal(1, B, L, F)
SOURCE_BLF = normal(2, B, L, F)


@pytest.fixture(scope="module")
def params(random_params):
    return random_params(backbone.init, CONFIG)


@jax.jit
def apply(params, x_BLF, edits=()):
    return backbone.apply(params, CONFIG, x_BLF, edits=edits)


@pytest.fixture(scope="module")
def base(params):
    return apply(params, X_BLF)


@pytest.fixture(scope="module")
def source(params):
    return apply(params, SOURCE_BLF)


@pytest.fixture(scope="module")
def swap_at(random_params):
    """Edit of a layer by a swap through phi with random parameters."""

    def make(phi, layer, source_BLD, coordinates=SOME_D, mask_BL=None, seed=3):
        operand = random_params(bijections.init, phi, seed=seed), source_BLD, coordinates
        return Edit(layer, "swap", operand, mask_BL, bijection=phi)

    return make


def assert_close(got, expected, atol=2e-5):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=atol), got, expected)


def assert_equal(got, expected):
    jax.tree.map(np.testing.assert_array_equal, got, expected)


@each_phi
def test_a_swap_at_no_step_is_bitwise_the_identity(params, base, source, swap_at, phi):
    nowhere = jnp.zeros((B, L), bool)
    assert_equal(
        apply(params, X_BLF, [swap_at(phi, layer, source[1][layer], mask_BL=nowhere) for layer in (0, 1)]), base
    )


@each_phi
def test_a_swap_with_oneself_is_the_identity(params, base, swap_at, phi):
    """Up to the error of the inverse."""
    assert_close(apply(params, X_BLF, [swap_at(phi, layer, base[1][layer]) for layer in (0, 2)]), base)


@each_phi
def test_a_swap_of_all_coordinates_gives_the_source_run(params, base, source, swap_at, phi):
    everything = jnp.ones(D, bool)
    for layer in (0, 1):
        outputs, taps = apply(params, X_BLF, [swap_at(phi, layer, source[1][layer], everything)])
        assert_close((outputs, taps[layer:]), (source[0], source[1][layer:]))
    assert np.abs(source[0]["action"] - base[0]["action"]).max() > 0.1


@each_phi
def test_a_swap_of_no_coordinates_is_the_identity(params, base, source, swap_at, phi):
    assert_close(apply(params, X_BLF, [swap_at(phi, 1, source[1][1], jnp.zeros(D, bool))]), base)


def test_a_swap_through_a_rotation_is_a_projection(params, base, source, swap_at):
    """The stream after it is h + P (source - h) with P from the swapped rows of Q, in float64."""
    edit = swap_at(PHIS[1], 1, source[1][1])
    Q = np.eye(D)
    for v in np.float64(edit.operand[0]["vectors"]):
        Q = Q @ (np.eye(D) - 2 * np.outer(v, v) / (v @ v))
    P = Q[np.asarray(SOME_D)].T @ Q[np.asarray(SOME_D)]
    h, donor = np.float64(base[1][1]), np.float64(source[1][1])
    np.testing.assert_allclose(apply(params, X_BLF, [edit])[1][1], h + (donor - h) @ P, atol=1e-5)


def test_a_full_swap_does_not_depend_on_the_rotation(params, source, swap_at):
    everything = jnp.ones(D, bool)
    one, other = (apply(params, X_BLF, [swap_at(PHIS[1], 1, source[1][1], everything, seed=s)]) for s in (4, 5))
    assert_close(one, other)
    some_one, some_other = (apply(params, X_BLF, [swap_at(PHIS[1], 1, source[1][1], seed=s)]) for s in (4, 5))
    assert np.abs(some_one[1][1] - some_other[1][1]).max() > 0.1


@each_phi
def test_a_swap_reaches_later_steps_and_layers_only(params, base, source, swap_at, phi):
    time = 4
    mask_BL = jnp.zeros((B, L), bool).at[0, time].set(True)
    outputs, taps = apply(params, X_BLF, [swap_at(phi, 1, source[1][1], mask_BL=mask_BL)])
    np.testing.assert_array_equal(taps[0], base[1][0])
    np.testing.assert_array_equal(np.any(np.asarray(taps[1] != base[1][1]), axis=-1), mask_BL)
    for after, before in ((taps[2], base[1][2]), (outputs["action"], base[0]["action"])):
        np.testing.assert_array_equal(after[1], before[1])
        np.testing.assert_array_equal(after[0, :time], before[0, :time])
        assert (after[0, time:] != before[0, time:]).any(-1).all()


def test_in_a_bidirectional_model_an_edit_reaches_earlier_steps():
    """So that the causality of the above is the model's, not the edit's."""
    h_BLD, mask_BL = normal(6, B, L, D), jnp.zeros((B, L), bool).at[:, 4].set(True)

    def model(edits):
        e_BLD = apply_edits(edits, 0, h_BLD)
        weights_BLM = jax.nn.softmax(jnp.einsum("BLD,BMD->BLM", e_BLD, e_BLD))
        return jnp.einsum("BLM,BMD->BLD", weights_BLM, e_BLD)

    edit = Edit(0, "swap", ({}, normal(7, B, L, D), SOME_D), mask_BL, bijection=PHIS[0])
    assert (np.asarray(model((edit,)) != model(())).any(-1)).all()


@each_phi
def test_swapped_steps_agree_with_the_parallel_form(params, source, swap_at, phi):
    mask_BL = jnp.asarray(np.random.default_rng(8).random((B, L)) < 0.5)
    edit = swap_at(phi, 1, source[1][1], mask_BL=mask_BL)
    phi_params, source_BLD, coordinates = edit.operand

    def step(state, inputs):
        x_BF, source_BD, mask_B = inputs
        now = edit.replace(operand=(phi_params, source_BD, coordinates), mask_BL=mask_B)
        outputs, taps, state = backbone.step(params, CONFIG, x_BF, state, edits=[now])
        return state, (outputs, taps)

    inputs = jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), (X_BLF, source_BLD, mask_BL))
    by_step = jax.jit(lambda: jax.lax.scan(step, backbone.init_state(CONFIG, B, L), inputs)[1])()
    assert_close(jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), by_step), apply(params, X_BLF, [edit]))


def test_jit_changes_nothing_and_vmap_over_swaps_is_a_loop(params, source, swap_at):
    edits = [swap_at(PHIS[2], 1, source[1][1], jnp.arange(D) < n, seed=n) for n in (1, 3, 4)]
    loop = [apply(params, X_BLF, [edit]) for edit in edits]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *edits)
    many = jax.vmap(lambda edit: apply(params, X_BLF, [edit]))(stacked)
    assert_close(many, jax.tree.map(lambda *leaves: jnp.stack(leaves), *loop))
    assert_equal(apply(params, X_BLF, [edits[0]]), loop[0])
    h_BLD = source[1][0]
    assert_close(apply_edits((edits[1],), 1, h_BLD), jax.jit(apply_edits, static_argnums=1)((edits[1],), 1, h_BLD))


def test_gradients_reach_bijection_source_and_what_lies_below(params, source, swap_at):
    """All that the swap reads has a gradient; swapped coordinates of the stream have none."""
    edit = swap_at(PHIS[2], 1, source[1][1])

    @jax.jit
    def grads(params, operand):
        def loss(params, phi_params, source_BLD):
            swapped = edit.replace(operand=(phi_params, source_BLD, SOME_D))
            return jnp.square(backbone.apply(params, CONFIG, X_BLF, edits=[swapped])[0]["action"]).sum()

        return jax.grad(loss, (0, 1, 2))(params, *operand[:2])

    by_params, *by_operand = grads(params, edit.operand)
    for leaf in jax.tree.leaves((by_params["block_0"], by_params["block_1"], by_operand)):
        assert np.isfinite(leaf).all()
        assert np.abs(leaf).max() > 0
    identity = swap_at(PHIS[0], 0, normal(9, B, L, D))
    by_stream = jax.grad(lambda h: apply_edits((identity,), 0, h).sum())(normal(10, B, L, D))
    np.testing.assert_array_equal(by_stream, np.broadcast_to(~np.asarray(SOME_D), (B, L, D)))


@pytest.mark.parametrize("operator", ["replace", "add", "low_rank", "project_out", "swap"])
def test_an_edit_keeps_the_dtype_of_the_stream(operator, swap_at):
    """A bfloat16 stream with float32 operands: the value is that of float32, rounded."""
    h, donor = normal(11, B, L, D).astype(jnp.bfloat16), normal(12, B, L, D)
    operands = {
        "replace": donor,
        "add": donor,
        "low_rank": (normal(13, 3, D), normal(14, D, 3)),
        "project_out": normal(15, D),
    }
    if operator == "swap":
        edit = swap_at(PHIS[2], 0, donor)
    else:
        edit = Edit(0, operator, operands[operator])
    after = jax.jit(partial(apply_edits, (edit,), 0))(h)
    assert after.dtype == jnp.bfloat16
    assert_close(after.astype(jnp.float32), apply_edits((edit,), 0, h.astype(jnp.float32)), atol=0.05)


def test_a_swap_without_its_bijection_or_with_bad_operands_is_refused():
    h_BLD = normal(16, B, L, D)
    edit = Edit(0, "swap", ({}, h_BLD, SOME_D))
    with pytest.raises(ValueError, match="bijection is None, expected a config of"):
        apply_edits((edit,), 0, h_BLD)
    edit = Edit(0, "swap", ({}, h_BLD[:, :3], SOME_D), bijection=PHIS[0])
    with pytest.raises(ValueError, match=r"source has shape \(2, 3, 6\), expected \(2, 7, 6\)"):
        apply_edits((edit,), 0, h_BLD)
