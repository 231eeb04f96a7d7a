"""Multi-path scanning against a loop over paths, and its symmetry."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqmod.mixers import MambaConfig, MultipathConfig, mamba, multipath
from tests.seqmod.mixers.family import Case, run, sequence

pytestmark = pytest.mark.usefixtures("quick_compile")

MAMBA = MambaConfig(width=5, states=3, kernel=2)
B, L, D = 2, 7, 5


def case_of(random_params, **changes) -> Case:
    config = MultipathConfig(MAMBA, **changes)
    return Case(multipath.MIXER, config, random_params(multipath.init, config), sequence(B, L, D))


orders = jax.jit(multipath.orders, static_argnums=0)


def mamba_along(case: Case, x_LD, order_L) -> np.ndarray:
    """Mamba over the steps in an order, put back in their own."""
    y_LD = np.zeros(x_LD.shape)
    y_LD[order_L] = run(Case(mamba.MIXER, MAMBA, case.params["mamba"], x_LD), x_LD[None, order_L])[0]
    return y_LD


def reference(case: Case, x_LD, orders_PL) -> np.ndarray:
    paths = [mamba_along(case, x_LD, order_L) for order_L in orders_PL]
    if not case.config.gated:
        return np.mean(paths, axis=0)
    pooled = np.concatenate([path.mean(0) for path in paths])
    logits = pooled @ np.asarray(case.params["gate"], np.float64).reshape(len(pooled), -1)
    gates = np.exp(logits - logits.max())
    return sum(g * path for g, path in zip(gates / gates.sum(), paths, strict=True))


@pytest.mark.parametrize("gated", [True, False])
def test_multipath_against_a_loop_over_paths(random_params, gated):
    case = case_of(random_params, gated=gated)
    orders_PL = np.asarray(orders(case.config, jnp.ones((1, L), bool))[:, 0])
    np.testing.assert_array_equal(orders_PL[:2], [np.arange(L), np.arange(L)[::-1]])
    assert sorted(orders_PL[2]) == list(range(L))
    expected = reference(case, case.x_BLD[1], orders_PL)
    np.testing.assert_allclose(run(case, case.x_BLD)[1], expected, rtol=1e-4, atol=1e-6)


def test_one_path_is_mamba(random_params):
    forward, reverse = (case_of(random_params, paths=(path,)) for path in ("forward", "reverse"))
    plain_BLD = run(Case(mamba.MIXER, MAMBA, forward.params["mamba"], forward.x_BLD), forward.x_BLD)
    np.testing.assert_allclose(run(forward, forward.x_BLD), plain_BLD, rtol=1e-5, atol=1e-6)
    flipped_BLD = run(reverse, reverse.x_BLD[:, ::-1])[:, ::-1]
    np.testing.assert_allclose(flipped_BLD, plain_BLD, rtol=1e-5, atol=1e-6)


def test_a_reversed_input_with_exchanged_gates_gives_a_reversed_output(random_params):
    case = case_of(random_params, paths=("forward", "reverse"))
    exchanged = case.params | {"gate": case.params["gate"][::-1, :, ::-1]}
    y_BLD = run(case._replace(params=exchanged), case.x_BLD[:, ::-1])[:, ::-1]
    np.testing.assert_allclose(y_BLD, run(case, case.x_BLD), rtol=1e-5, atol=1e-6)


def test_shuffles_are_fixed_by_the_seed_or_drawn_from_a_key():
    paths = ("shuffle", "shuffle", "forward")
    configs = [MultipathConfig(MAMBA, paths, seed=seed) for seed in (0, 0, 1)]
    mask_BL = jnp.ones((1, 31), bool)
    one, same, other = (np.asarray(orders(config, mask_BL)) for config in configs)
    keyed = np.asarray(orders(configs[0], mask_BL, jax.random.key(5)))
    np.testing.assert_array_equal(one, same)
    for a, b in itertools.combinations((one[0], one[1], other[0], keyed[0]), 2):
        assert (a != b).any()
    np.testing.assert_array_equal(one[2], keyed[2])


def test_a_key_changes_the_output_of_shuffled_paths_alone(random_params):
    for paths, changes in ((("forward", "reverse", "shuffle"), True), (("forward", "reverse"), False)):
        case = case_of(random_params, paths=paths)
        fixed_BLD = run(case, case.x_BLD)
        drawn_BLD = jax.jit(multipath.apply, static_argnums=1)(
            case.params, case.config, case.x_BLD, key=jax.random.key(9)
        )
        assert np.allclose(fixed_BLD, drawn_BLD, rtol=1e-4, atol=1e-5) != changes


def test_padding_comes_last_and_leaves_the_shuffle_alone():
    config = MultipathConfig(MAMBA)
    mask_BL = jnp.array([[0, 0, 1, 1, 1, 1, 0], [1, 1, 1, 1, 0, 0, 0]], bool)
    alone_PL = np.asarray(orders(config, jnp.ones((1, 4), bool)))[:, 0]
    order_PBL = np.asarray(orders(config, mask_BL))
    np.testing.assert_array_equal(order_PBL[:, 0, :4], alone_PL + 2)
    np.testing.assert_array_equal(order_PBL[:, 1, :4], alone_PL)


def test_multipath_refuses_unknown_paths():
    for paths in ((), ("forward", "spiral")):
        with pytest.raises(ValueError, match="expected some of"):
            MultipathConfig(MAMBA, paths)
