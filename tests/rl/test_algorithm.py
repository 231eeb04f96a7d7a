"""What is refused: networks made for another algorithm, space or observation, and metrics that are not finite."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gymnax.environments import spaces

from rl import a2c, dqn, group, ppo, sac
from rl.algorithm import check_finite
from rl.envs.probe import policy
from rl.networks import CNN, MLP, ActorCritics, Network, actor_critic, feed_forward, q_network, squashed_actor_critics
from rl.policies import Categorical

DISCRETE, CONTINUOUS = (policy(continuous).env for continuous in (False, True))
TWO, BOX = (env.action_space(env.default_params) for env in (DISCRETE, CONTINUOUS))
WIDER = spaces.Box(-1.0, 1.0, (2,))
CONFIGS = {
    ppo: ppo.PPOConfig(environments=3, steps=4, minibatches=3),
    a2c: a2c.A2CConfig(environments=3, steps=4),
    group: group.GroupConfig(groups=2, episodes=2, horizon=2),
    dqn: dqn.DQNConfig(environments=3, steps=4, capacity=9, learning_starts=5),
    sac: sac.SACConfig(environments=3, steps=4, capacity=9, learning_starts=5),
}
HYPERS = {ppo: ppo.PPOHyper, a2c: a2c.A2CHyper, group: group.GroupHyper, dqn: dqn.DQNHyper, sac: sac.SACHyper}
POLICIES = (ppo, a2c, group)


def begin(module: Any, env: Any, network: Any) -> Any:
    """Shapes of the first state."""
    algorithm = module.make(CONFIGS[module], env, network)
    return jax.eval_shape(algorithm.init, jax.random.key(0), HYPERS[module](), env.default_params)


def plain(outputs: Any) -> Network:
    """A network whose outputs are functions of B."""
    return feed_forward(lambda key: (), lambda params, obs: outputs(len(obs)))


def swapped(networks: ActorCritics) -> ActorCritics:
    """The critics get an actor that takes what critics take."""
    actor = networks.actor
    return networks._replace(critics=actor._replace(step=lambda params, x, memory: actor.step(params, x[0], memory)))


@pytest.mark.parametrize("module", POLICIES)
@pytest.mark.parametrize(
    ("env", "network", "found", "expected"),
    [
        (DISCRETE, q_network((1,), TWO), "(B, 2)", "(Categorical(logits=(B, 2)), (B,))"),
        (
            DISCRETE,
            actor_critic((1,), BOX),
            "(Gaussian(mean=(B, 1), log_std=(B, 1)), (B,))",
            "(Categorical(logits=(B, 2))",
        ),
        (
            CONTINUOUS,
            actor_critic((1,), TWO),
            "(Categorical(logits=(B, 2)), (B,))",
            "(Gaussian(mean=(B, 1), log_std=(B, 1))",
        ),
        (DISCRETE, plain(lambda B: (Categorical(jnp.zeros((B, 5))), jnp.zeros(B))), "logits=(B, 5)", "logits=(B, 2)"),
        (DISCRETE, plain(lambda B: (Categorical(jnp.zeros((B, 2))), jnp.zeros((B, 1)))), "(B, 1))", "(B,))"),
        (CONTINUOUS, squashed_actor_critics((1,), BOX).actor, "((B, 1), (B, 1))", "(Gaussian("),
        (DISCRETE, actor_critic((1,), BOX, squashed=True), "(SquashedGaussian(mean=(B, 1)", "(Categorical("),
        (
            CONTINUOUS,
            actor_critic((1,), WIDER, squashed=True),
            "(SquashedGaussian(mean=(B, 2)",
            "(Gaussian(mean=(B, 1)",
        ),
    ],
    ids=["q_network", "box", "discrete", "actions", "value", "actor", "squashed", "squashed-actions"],
)
def test_policies_of_other_outputs_are_refused(module, env, network, found, expected):
    with pytest.raises(ValueError, match=rf"^{module.__name__[3:]}: the network's step returned") as error:
        begin(module, env, network)
    said, batch = str(error.value), "1" if module is group else "3"
    told, wanted = said.split("expected")
    assert found.replace("B", batch) in told
    assert expected.replace("B", batch) in wanted
    assert said.endswith("as of networks.actor_critic for the environment's action space")


@pytest.mark.parametrize(
    ("module", "network", "message"),
    [
        (
            dqn,
            actor_critic((1,), TWO),
            r"\(Categorical\(logits=\(3, 2\)\), \(3,\)\), expected \(3, 2\), as of networks.q_network",
        ),
        (dqn, plain(lambda B: jnp.zeros((B, 5))), r"\(3, 5\), expected \(3, 2\)"),
        (
            sac,
            ActorCritics(actor_critic((1,), BOX), squashed_actor_critics((1,), BOX).critics),
            "the actor's step .* expected",
        ),
        (sac, swapped(squashed_actor_critics((1,), BOX)), r"the critics' step .* expected \(2, 3\)"),
    ],
    ids=["dqn-actor_critic", "dqn-actions", "sac-actor", "sac-critics"],
)
def test_values_of_other_shapes_are_refused(module, network, message):
    with pytest.raises(ValueError, match=message):
        begin(module, DISCRETE if module is dqn else CONTINUOUS, network)


@pytest.mark.parametrize("module", CONFIGS)
def test_networks_of_another_kind_are_refused(module):
    of_sac, of_others = squashed_actor_critics((1,), BOX), actor_critic((1,), BOX)
    env, wrong = (CONTINUOUS, of_others) if module is sac else (DISCRETE, of_sac)
    expected = "Network, expected ActorCritics" if module is sac else "ActorCritics, expected Network"
    with pytest.raises(ValueError, match=f"{module.__name__[3:]}: network is a {expected}, as of networks"):
        module.make(CONFIGS[module], env, wrong)


@pytest.mark.parametrize("module", POLICIES)
@pytest.mark.parametrize(
    ("recurrent", "shape", "message"),
    [
        (False, lambda B: (B, 7), "has a memory but recurrent=False"),
        (True, lambda B: (2, B, 7), r"init_memory\((\d)\) has an array of shape \(2, \1, 7\), expected \(\1, \.\.\.\)"),
    ],
    ids=["unsaid", "layers first"],
)
def test_memories_that_would_be_mixed_up_are_refused(module, recurrent, shape, message):
    network = plain(lambda B: (Categorical(jnp.zeros((B, 2))), jnp.zeros(B)))
    network = network._replace(init_memory=lambda B: jnp.zeros(shape(B)), recurrent=recurrent)
    with pytest.raises(ValueError, match=message):
        begin(module, DISCRETE, network)


def test_a_policy_of_ones_own_class_is_taken():
    class Uniform(Categorical):
        """Any class with a policy's methods."""

    network = plain(lambda B: (Uniform(jnp.zeros((B, 7))), jnp.zeros(B)))
    assert begin(ppo, DISCRETE, network).update.shape == ()


@pytest.mark.parametrize("torso", [MLP((7,)), CNN((2,), 2)], ids=["mlp", "cnn"])
def test_observations_of_another_shape_are_refused(torso):
    network = actor_critic((5, 3, 2), TWO, torso)
    params = jax.eval_shape(network.init, jax.random.key(0))
    for obs, found in ((jnp.zeros((4, 30)), r"\(4, 30\)"), ({"x": jnp.zeros((4, 5, 3, 2))}, r"{'x': \(4, 5, 3, 2\)}")):
        with pytest.raises(ValueError, match=rf"last axes are \(5, 3, 2\), it got {found}"):
            jax.eval_shape(network.step, params, obs, ())
    (_, value), _ = jax.eval_shape(network.step, params, jnp.zeros((11, 4, 5, 3, 2)), ())
    assert value.shape == (11, 4)


@pytest.mark.parametrize(
    ("shape", "axis", "bad", "where", "run"),
    [
        ((), 0, [()], "update 0", ""),
        ((7,), 0, [(3,), (5,)], "update 3", ""),
        ((7, 2), 0, [(4, 0), (3, 1)], "update 3", r" \(seed 1\)"),
        ((2, 7), -1, [(0, 4), (1, 3)], "update 3", r" \(seed 1\)"),
        ((5, 2, 7), -1, [(1, 1, 6), (4, 0, 3)], "update 3", r" \(run \(4, 0\)\)"),
    ],
    ids=["number", "run", "updates of seeds", "seeds of updates", "settings of seeds"],
)
def test_the_first_update_that_is_not_finite_is_named_and_its_seed(shape, axis, bad, where, run):
    good, index = np.zeros(shape), tuple(np.transpose(bad))
    counts, losses = good.astype(int), good.copy()
    counts[index], losses[index] = 2, np.nan
    check_finite({"bad_observations": good, "value_loss": good, "episode_return": losses}, axis=axis)
    for metrics, said in (
        ({"bad_observations": counts, "value_loss": losses}, f"observations are not finite in {where}: .* at fault"),
        ({"bad_observations": good, "value_loss": losses}, f"value_loss is not finite in {where}: .* say"),
    ):
        with pytest.raises(FloatingPointError, match=f"^{said}{run}$"):
            check_finite(metrics, axis=axis)
