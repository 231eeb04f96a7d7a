"""Bijections: inverses, orthogonality, and the maps themselves against NumPy in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqmod import bijections
from seqmod.bijections import IdentityConfig, OrthogonalConfig, RevNetConfig, orthogonal_matrix

pytestmark = pytest.mark.usefixtures("quick_compile")

D = 14
CONFIGS = (IdentityConfig(D), OrthogonalConfig(D), RevNetConfig(D, blocks=5, hidden=11))
each_bijection = pytest.mark.parametrize("config", CONFIGS, ids=lambda config: type(config).__name__)

forward = jax.jit(bijections.forward, static_argnums=1)
inverse = jax.jit(bijections.inverse, static_argnums=1)
swap = jax.jit(bijections.swap, static_argnums=1)


def normal(seed: int, *shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


H = normal(1, 3, 5, D)
COORDINATES_D = jnp.arange(D) % 3 == 1


def reflections(vectors_DD) -> np.ndarray:
    """The product of the reflections, one after another, in float64."""
    product = np.eye(len(vectors_DD))
    for v in np.float64(vectors_DD):
        product = product @ (np.eye(len(v)) - 2 * np.outer(v, v) / (v @ v))
    return product


def revnet(params, h) -> np.ndarray:
    """The RevNet in float64."""
    params = jax.tree.map(np.float64, params)
    one, two = np.split(np.float64(h), 2, axis=-1)

    def mlp(net, block, x):
        hidden = np.maximum(x @ net["up"][block] + net["up_bias"][block], 0)
        return hidden @ net["down"][block] + net["down_bias"][block]

    for block in range(len(params["first"]["up"])):
        one = one + mlp(params["first"], block, two)
        two = two + mlp(params["second"], block, one)
    return np.concatenate([one, two], axis=-1)


@each_bijection
def test_the_inverse_undoes_the_map(random_params, config):
    params = random_params(bijections.init, config)
    z = forward(params, config, H)
    np.testing.assert_allclose(inverse(params, config, z), H, atol=2e-5)
    np.testing.assert_allclose(forward(params, config, inverse(params, config, H)), H, atol=2e-5)
    assert isinstance(config, IdentityConfig) or np.abs(z - H).max() > 1


@each_bijection
def test_the_inverse_undoes_the_map_as_it_is_initialised(config):
    params = jax.jit(bijections.init, static_argnums=1)(jax.random.key(0), config)
    np.testing.assert_allclose(inverse(params, config, forward(params, config, H)), H, atol=1e-5)


def test_the_maps_are_those_of_float64(random_params):
    identity, orthogonal, net = CONFIGS
    np.testing.assert_array_equal(forward({}, identity, H), H)
    params = random_params(bijections.init, orthogonal)
    expected = np.float64(H) @ reflections(params["vectors"]).T
    np.testing.assert_allclose(forward(params, orthogonal, H), expected, atol=1e-5)
    params = random_params(bijections.init, net)
    np.testing.assert_allclose(forward(params, net, H), revnet(params, H), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("size", [1, 2, 17, 64])
def test_the_matrix_is_orthogonal_to_float_precision(size):
    """For rows of any length, and rows that are all but parallel."""
    for vectors in (1e3 * normal(2, size, size), normal(3, size, size) + 9 * normal(4, 1, size)):
        matrix = np.float64(jax.jit(orthogonal_matrix)(vectors))
        np.testing.assert_allclose(matrix.T @ matrix, np.eye(size), atol=1e-5)
        np.testing.assert_allclose(matrix, reflections(vectors), atol=1e-5)


def test_any_swap_through_an_orthogonal_map_is_a_projection(random_params):
    """h + P (source - h), P = Q_S' Q_S of the rows S of Q (section 3 of arXiv 2303.02536): no phi, no inverse."""
    config = OrthogonalConfig(D)
    params, source = random_params(bijections.init, config), normal(5, 3, 5, D)
    rows_SD = reflections(params["vectors"])[np.asarray(COORDINATES_D)]
    expected = np.float64(H) + np.float64(source - H) @ (rows_SD.T @ rows_SD)
    np.testing.assert_allclose(swap(params, config, H, source, COORDINATES_D), expected, atol=1e-5)


def test_a_swap_has_a_mask_of_coordinates_for_each_row(random_params):
    config, source = CONFIGS[2], normal(5, 3, 5, D)
    params = random_params(bijections.init, config)
    mask = jnp.asarray(np.random.default_rng(6).random((3, 1, D)) < 0.5)
    after = swap(params, config, H, source, mask)
    for row in range(3):
        np.testing.assert_allclose(after[row], swap(params, config, H[row], source[row], mask[row, 0]), atol=1e-6)


@each_bijection
def test_bfloat16_comes_back_bit_for_bit(random_params, config):
    """The map is computed in float32, so rounding its inverse gives the very bfloat16 that went in."""
    params, h = random_params(bijections.init, config), H.astype(jnp.bfloat16)
    assert forward(params, config, h).dtype == jnp.float32
    after = swap(params, config, h, h, COORDINATES_D)
    assert after.dtype == jnp.bfloat16
    np.testing.assert_array_equal(after, h)


@each_bijection
def test_gradients_are_finite_differences(random_params, config):
    """By parameters, stream and source at once, along a random direction, in float64."""
    with jax.enable_x64(True):
        draw = np.random.default_rng(7)
        inputs = jax.tree.map(np.float64, (random_params(bijections.init, config), H[0], normal(5, 5, D)))
        direction = jax.tree.map(lambda x: draw.standard_normal(x.shape), inputs)

        @jax.jit
        def along(t):
            params, h, source = jax.tree.map(lambda x, d: x + t * d, inputs, direction)
            return jnp.sin(bijections.swap(params, config, h, source, COORDINATES_D)).sum()

        difference = (along(1e-7) - along(-1e-7)) / 2e-7
        np.testing.assert_allclose(jax.grad(along)(0.0), difference, rtol=1e-6)
        assert abs(difference) > 0.1


@each_bijection
def test_jit_changes_nothing_and_vmap_is_a_loop(random_params, config):
    """Over bijections, streams and sources at once."""
    many = [random_params(bijections.init, config, seed=seed) for seed in range(3)]
    stacked, source = jax.tree.map(lambda *leaves: jnp.stack(leaves), *many), normal(5, 3, 5, D)
    batched = jax.jit(jax.vmap(lambda params, h, source: bijections.swap(params, config, h, source, COORDINATES_D)))
    loop = [swap(params, config, H[i], source[i], COORDINATES_D) for i, params in enumerate(many)]
    np.testing.assert_allclose(batched(stacked, H, source), loop, atol=1e-5)
    eager = bijections.swap(many[0], config, H[0], source[0], COORDINATES_D)
    np.testing.assert_allclose(eager, loop[0], atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "arguments", "message"),
    [
        (RevNetConfig, {"width": 7}, "RevNetConfig: width is 7, expected an even number"),
        (RevNetConfig, {"width": 6, "blocks": 0}, "RevNetConfig: blocks is 0, expected at least 1"),
        (RevNetConfig, {"width": 6, "hidden": -3}, "RevNetConfig: hidden is -3, expected at least 1"),
        (OrthogonalConfig, {"width": 0}, "OrthogonalConfig: width is 0, expected at least 1"),
        (IdentityConfig, {"width": -1}, "IdentityConfig: width is -1, expected at least 1"),
    ],
)
def test_a_bad_config_is_refused(kind, arguments, message):
    with pytest.raises(ValueError, match=message):
        kind(**arguments)


def test_bad_arrays_are_refused():
    config = IdentityConfig(D)
    for function in (bijections.forward, bijections.inverse):
        with pytest.raises(ValueError, match=f"the last axis has size 5, expected the width {D} of"):
            function({}, config, jnp.zeros((3, 5)))
        with pytest.raises(ValueError, match=f"{function.__name__}: config is 'rotation', expected one of"):
            function({}, "rotation", H)
    with pytest.raises(ValueError, match=r"source has shape \(3, 5\), expected \(3, 5, 14\)"):
        bijections.swap({}, config, H, H[..., 0], COORDINATES_D)
    for coordinates, shape in (
        (jnp.ones(D), "float32"),
        (COORDINATES_D[1:], r"bool\(13,\)"),
        (H[0] > 0, r"bool\(5, 14\)"),
    ):
        with pytest.raises(ValueError, match=f"swap: coordinates are {shape}"):
            bijections.swap({}, config, H, H, coordinates)
