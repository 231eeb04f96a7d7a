"""Networks: a memory run step by step equals each episode by itself; a convolution equals a loop."""

import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gymnax.environments import spaces

from rl.networks import CNN, MLP, Memory, actor_critic, squashed_actor_critics, torso, unroll
from rl.policies import Categorical, Gaussian, SquashedGaussian
from seqmod import backbone
from seqmod.config import BackboneConfig

pytestmark = pytest.mark.usefixtures("quick_compile")


@pytest.mark.parametrize("mixer", ["attention", "rglru", "mamba", "gated_deltanet"])
def test_a_memory_over_a_rollout_is_the_model_of_each_episode(mixer, random_params):
    """Episodes begin apart, one of them before the rollout; the oracle is the parallel form with segments."""
    model = BackboneConfig(inputs=1, mixers=(mixer,) * 2, width=8, mlp=12, attention_heads=2, context=17)
    config = Memory(model, MLP((7,), "relu"))
    network, size = torso(config, (3,))
    assert (size, network.recurrent) == (8, True)
    params = random_params(network.init, scale=0.3)
    obs_TB = jax.random.normal(jax.random.key(1), (11, 3, 3))
    first_TB = jnp.zeros((11, 3), bool).at[jnp.array([0, 4, 7, 9]), jnp.array([0, 1, 1, 2])].set(True)
    whole, memory = unroll(network, params, obs_TB, first_TB, network.init_memory(3))
    part, half = unroll(network, params, obs_TB[:6], first_TB[:6], network.init_memory(3))
    rest, again = unroll(network, params, obs_TB[6:], first_TB[6:], half)

    model = replace(model, inputs=7, heads=(("features", 8),))
    x_TBF = jax.nn.relu(obs_TB @ params["embed"][0]["kernel"] + params["embed"][0]["bias"][None, None])
    segments_BT = jnp.cumsum(first_TB, 0).T + 1
    outputs, _ = backbone.apply(params["model"], model, jnp.moveaxis(x_TBF, 0, 1), segment_ids=segments_BT)
    wanted = jax.nn.relu(jnp.moveaxis(outputs["features"], 0, 1))
    np.testing.assert_allclose(whole, wanted, rtol=2e-4, atol=2e-5)
    np.testing.assert_allclose(jnp.concatenate([part, rest]), whole, rtol=1e-4, atol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), again, memory)


def test_a_convolution_is_the_sum_over_its_window(random_params):
    network, size = torso(CNN((2,), 3, (5,), "tanh"), (4, 5, 3))
    params = random_params(network.init)
    obs = jax.random.normal(jax.random.key(0), (2, 4, 5, 3))
    kernel, bias = (np.asarray(params["convolutions"][0][name], np.float64) for name in ("kernel", "bias"))
    x, planes = np.asarray(obs, np.float64), np.zeros((2, 2, 3, 2))
    for i, j in np.ndindex(2, 3):
        planes[:, i, j] = np.tanh(np.einsum("bhwc,hwco->bo", x[:, i : i + 3, j : j + 3], kernel) + bias)
    dense = params["mlp"][0]
    wanted = np.tanh(planes.reshape(2, -1) @ np.asarray(dense["kernel"]) + np.asarray(dense["bias"]))
    assert size == 5
    np.testing.assert_allclose(network.step(params, obs, ())[0], wanted, rtol=1e-4, atol=1e-5)
    twice = network.step(params, jnp.stack([obs, obs]), ())[0]
    np.testing.assert_allclose(twice, np.stack([wanted, wanted]), rtol=1e-4, atol=1e-5)


def test_an_actor_critic_starts_indifferent():
    obs = jax.random.normal(jax.random.key(0), (5, 7, 2, 3))
    for space, kind in ((spaces.Discrete(4), Categorical), (spaces.Box(-1.0, 1.0, (4,)), Gaussian)):
        network = actor_critic((2, 3), space, MLP((16, 11)))
        params = network.init(jax.random.key(1))
        (policy, value), memory = network.step(params, obs, ())
        assert isinstance(policy, kind)
        assert (value.shape, policy.mode().shape[:2], memory) == ((5, 7), (5, 7), ())
        output = policy.logits if isinstance(policy, Categorical) else policy.mean
        assert output.shape == (5, 7, 4)
        assert float(jnp.abs(output).max()) < 0.1
        kernel = params["torso"][0]["kernel"]
        np.testing.assert_allclose(kernel @ kernel.T, 2 * np.eye(6), atol=1e-5)  # orthogonal, scaled by sqrt 2


def test_a_squashed_actor_starts_with_the_spread_it_is_given():
    network = actor_critic((3,), spaces.Box(-1.0, 1.0, (4,)), MLP((16,)), log_std=-1.0, squashed=True)
    (policy, value), _ = network.step(network.init(jax.random.key(1)), jnp.ones((5, 3)), ())
    assert isinstance(policy, SquashedGaussian)
    assert (policy.mean.shape, value.shape) == ((5, 4), (5,))
    np.testing.assert_allclose(policy.log_std, np.full((5, 4), -1.0), atol=0.05)


def test_a_critic_of_its_own_and_the_spread_of_weights_that_begin_as_lecuns():
    obs, space = jnp.ones((2, 30)), spaces.Discrete(4)
    policy = MLP((40, 50), "silu", "lecun")
    network = actor_critic((30,), space, policy, critic=MLP((60,), "silu", "lecun"))
    params = network.init(jax.random.key(0))
    (logits, value), _ = network.step(params, obs, ())
    assert (logits.logits.shape, value.shape) == ((2, 4), (2,))
    assert [layer["kernel"].shape for layer in params["critic"]] == [(30, 60)]
    for layer in (*params["torso"], *params["critic"], params["policy"], params["value"]):
        kernel = np.asarray(layer["kernel"])
        limit = np.sqrt(3 / len(kernel))  # a uniform number within it has a variance of one over the inputs
        assert 0.8 * limit < abs(kernel).max() <= limit
        assert kernel.std() == pytest.approx(len(kernel) ** -0.5, rel=0.2)
    grads = jax.grad(lambda params: network.step(params, obs, ())[0][1].sum())(params)
    assert float(jnp.abs(grads["critic"][0]["kernel"]).sum()) > 0
    assert float(jnp.abs(grads["torso"][0]["kernel"]).sum()) == 0


def test_a_shared_torso_gets_both_gradients():
    network = actor_critic((3,), spaces.Discrete(2), MLP((4,)), shared=True)
    apart = actor_critic((3,), spaces.Discrete(2), MLP((4,)))
    obs = jnp.ones((2, 3))

    def value(params, network):
        return network.step(params, obs, ())[0][1].sum()

    grads = jax.grad(value)(network.init(jax.random.key(0)), network)
    assert float(jnp.abs(grads["torso"][0]["kernel"]).sum()) > 0
    grads = jax.grad(value)(apart.init(jax.random.key(0)), apart)
    assert float(jnp.abs(grads["torso"][0]["kernel"]).sum()) == 0


def test_wrong_settings_are_named():
    with pytest.raises(ValueError, match="activation is 'gelu', expected one of"):
        MLP(activation="gelu")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"MLP: hidden is \(0,\)"):
        MLP((0,))
    with pytest.raises(ValueError, match="initialisation is 'zeros', expected one of"):
        MLP(initialisation="zeros")  # pyright: ignore[reportArgumentType]
    for shared, body in ((True, MLP()), (False, Memory())):
        with pytest.raises(ValueError, match="a critic of its own has no part in a shared torso"):
            actor_critic((3,), spaces.Discrete(2), body, critic=MLP(), shared=shared)
    with pytest.raises(ValueError, match="channels is empty"):
        CNN(())
    with pytest.raises(ValueError, match=r"shape \(4,\), expected \(H, W, C\)"):
        torso(CNN(), (4,))
    with pytest.raises(ValueError, match="H and W above 4"):
        torso(CNN((3, 3), 3), (4, 9, 1))
    with pytest.raises(ValueError, match="expected a Discrete or a Box"):
        actor_critic((3,), spaces.Tuple([spaces.Discrete(2)]), MLP())
    for shape in ((), (2, 3)):
        for make in (actor_critic, squashed_actor_critics):
            with pytest.raises(
                ValueError, match=f"{make.__name__}: action space is a Box of shape {re.escape(str(shape))}"
            ):
                make((3,), spaces.Box(-1.0, 1.0, shape))
