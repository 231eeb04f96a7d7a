"""Internal RL: the fast rollout against the environment that defines it, and learning with everything else frozen."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from rl import Controlled, Frozen, GRPOConfig, InternalEnv, InternalParams, PolicyConfig, grpo, internal
from seqmod import BackboneConfig, MetacontrollerConfig, backbone, metacontroller

pytestmark = pytest.mark.usefixtures("quick_compile")

B, L, M, D, Z = 11, 13, 5, 6, 3
MODEL = BackboneConfig(
    inputs=5, heads=(("action", 3),), mixers=("attention", "rglru"), width=D, mlp=11, attention_heads=2, context=20
)
META = MetacontrollerConfig(
    width=D,
    latent=Z,
    history=4,
    embedding=2,
    encoder_hidden=3,
    switch_hidden=13,
    decoder_hidden=9,
    rank=2,
    embedder_width=4,
)
LEARNED = Controlled(MODEL, META, layer=1, threshold=0.45, max_switches=M)
FORCED = Controlled(MODEL, META, layer=2, max_switches=L, always_open=True)
POLICY = PolicyConfig(inputs=D, latent=Z, width=8)
CONFIG = GRPOConfig(batch=B, horizon=L, minibatches=1)


@pytest.fixture(scope="module")
def frozen(random_params) -> Frozen:
    model = random_params(backbone.init, MODEL, scale=0.6)
    # The base model is as good as deterministic, so that episodes are comparable whatever keys their actions have.
    model["heads"] = jax.tree.map(lambda x: 1e4 * x, model["heads"])
    return Frozen(model, random_params(metacontroller.init, META, scale=0.6))


@pytest.fixture(scope="module")
def policy(random_params):
    return random_params(internal.init_policy, POLICY, seed=1)


@partial(jax.jit, static_argnums=(0, 1))
def rolled(controlled, env, env_params, frozen, policy):
    """A group of episodes, and the log-probabilities of their codes in the policy's parallel form."""
    batch, raw = internal.abstract_rollout(
        CONFIG, controlled, POLICY, env, env_params, frozen, policy, jax.random.key(2)
    )
    return batch, raw, internal.policy_log_prob(POLICY, policy, batch.inputs, batch.actions)


def limits(tiny, controlled):
    """Episodes of 1 to 17 steps: some terminate, and some are cut, by the environment or at the horizon."""
    return tiny.params(longest=17, max_steps=12 if controlled is FORCED else 100, step_reward=0.5)


@pytest.mark.parametrize("controlled", [LEARNED, FORCED], ids=["learned", "forced"])
def test_recomputed_log_probabilities_are_those_of_the_rollout(tiny, frozen, policy, controlled):
    batch, _, log_prob_BM = rolled(controlled, tiny, limits(tiny, controlled), frozen, policy)
    difference = np.abs(np.where(batch.mask_BL, log_prob_BM - batch.log_prob_BL, 0))
    assert difference.max() < 1e-5
    assert np.ptp(np.asarray(batch.log_prob_BL)[np.asarray(batch.mask_BL)]) > 0.5


def test_the_learned_gate_opens_at_reset_and_so_often_at_most(tiny, frozen, policy):
    batch, raw, _ = rolled(LEARNED, tiny, limits(tiny, LEARNED), frozen, policy)
    open_BL, valid_BL = np.asarray(raw["open_BL"]), np.asarray(raw["valid_BL"])
    assert open_BL[:, 0].all()
    assert not (open_BL & ~valid_BL).any()
    np.testing.assert_array_equal(open_BL.sum(1), batch.mask_BL.sum(1))
    assert {2, M} <= set(open_BL.sum(1).tolist())
    assert (open_BL.sum(1) < np.minimum(valid_BL.sum(1), M)).any()


def test_the_forced_gate_opens_at_every_step(tiny, frozen, policy):
    batch, raw, _ = rolled(FORCED, tiny, limits(tiny, FORCED), frozen, policy)
    np.testing.assert_array_equal(raw["open_BL"], raw["valid_BL"])
    np.testing.assert_array_equal(batch.mask_BL, raw["valid_BL"])


@pytest.mark.parametrize("controlled", [LEARNED, FORCED], ids=["learned", "forced"])
def test_the_fast_rollout_is_the_environment_step_for_step(tiny, frozen, policy, controlled):
    batch, raw, _ = rolled(controlled, tiny, limits(tiny, controlled), frozen, policy)
    env = InternalEnv(tiny, controlled, L)
    assert (env.observation_size, env.action_size) == (D, Z)
    params = InternalParams(limits(tiny, controlled), frozen)

    @jax.jit
    def episodes(reset_key_B, z_BMZ):
        """The codes of the fast rollout, one abstract step after another."""
        e_BD, state = jax.vmap(env.reset_env, (0, None))(reset_key_B, params)

        def step(carry, inputs):
            e_BD, state = carry
            z_BZ, key = inputs
            after, state, reward_B, terminated_B, info = jax.vmap(env.step_env, (0, 0, 0, None))(
                jax.random.split(key, B), state, z_BZ, params
            )
            truncated_B = jax.vmap(env.is_truncated, (0, None))(state, params)
            return (after, state), (e_BD, reward_B, terminated_B | truncated_B, info["raw_steps"])

        keys = jax.random.split(jax.random.key(9), controlled.max_switches)
        (_, state), trace = jax.lax.scan(step, (e_BD, state), (jnp.swapaxes(z_BMZ, 0, 1), keys))
        return state, jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), trace)

    k_reset, _ = jax.random.split(jax.random.key(2))  # as `rollout` does
    state, (e_BMD, reward_BM, ended_BM, raw_BM) = episodes(jax.random.split(k_reset, B), batch.actions)
    mask_BM = np.asarray(batch.mask_BL)
    np.testing.assert_allclose(e_BMD[mask_BM], batch.inputs[mask_BM], rtol=1e-4, atol=1e-4)
    # The last code of an episode is held to its end, and nothing happens after it, whatever the code.
    last_B = mask_BM.sum(1) - 1
    np.testing.assert_array_equal(ended_BM, np.arange(mask_BM.shape[1])[None] >= last_B[:, None])
    np.testing.assert_allclose(reward_BM.sum(1), batch.return_B, rtol=1e-5)
    assert not reward_BM[~mask_BM].any()
    assert not raw_BM[~mask_BM].any()
    # A code is held until the step at which the fast rollout's gate opens.
    for b, length in enumerate(raw["valid_BL"].sum(1)):
        opened = np.flatnonzero(raw["open_BL"][b])
        np.testing.assert_array_equal(raw_BM[b][mask_BM[b]], np.diff([*opened, length]))
    jax.tree.map(np.testing.assert_array_equal, state.raw, raw["final_state"])
    assert set(state.terminated.tolist()) == {True, False}
    assert int(state.time.max()) == (12 if controlled is FORCED else L)


def test_first_codes_have_the_initial_spread_whatever_is_seen():
    policy = PolicyConfig(inputs=8, latent=Z, width=8, initial_std=2.0)
    params = internal.init_policy(jax.random.key(0), policy)
    e_BMD = 3.0 * jax.random.normal(jax.random.key(1), (4, 3, 8))
    z_BMZ = jax.random.normal(jax.random.key(2), (4, 3, Z))
    expected = scipy.stats.norm(scale=2.0).logpdf(np.asarray(z_BMZ, np.float64)).sum(-1)
    np.testing.assert_allclose(internal.policy_log_prob(policy, params, e_BMD, z_BMZ), expected, rtol=1e-5)
    with pytest.raises(ValueError, match="initial_std is 0"):
        PolicyConfig(inputs=8, latent=Z, initial_std=0.0)


LEARNER = BackboneConfig(inputs=5, heads=(("action", 3),), mixers=("rglru",), width=8, mlp=11, attention_heads=2)
LEARNER_META = MetacontrollerConfig(
    width=8, latent=Z, history=4, embedding=2, encoder_hidden=3, switch_hidden=5, rank=5, embedder_width=4
)


def test_only_the_policy_learns_and_it_does(tiny, random_params):
    """At most two codes an episode must make the base model choose up to three actions, right in the context.

    Some seeds stay at a policy that is right in part of the contexts, so several run side by side.
    """
    controlled = Controlled(LEARNER, LEARNER_META, layer=1, max_switches=2)
    policy = PolicyConfig(inputs=8, latent=Z, width=8)
    config = GRPOConfig(batch=48, horizon=3, epochs=2, minibatches=2)
    frozen = Frozen(
        random_params(backbone.init, LEARNER, seed=1, scale=1.0),
        random_params(metacontroller.init, LEARNER_META, seed=1, scale=1.0),
    )
    params = random_params(internal.init_policy, policy)
    params["heads"] = jax.tree.map(jnp.zeros_like, params["heads"])

    @jax.jit
    @partial(jax.vmap, in_axes=(0, None))
    def train(key, frozen):
        def update(state, _):
            env_params = tiny.params(longest=3)
            return internal.internal_update(config, controlled, policy, tiny, env_params, frozen, state, 0.01)

        return jax.lax.scan(update, grpo.start(config, params, key), length=150)

    before = jax.tree.map(np.array, frozen)
    state, metrics = train(jax.random.split(jax.random.key(0), 6), frozen)
    success = metrics["success"]
    assert success[:, :5].mean() < 0.4
    assert np.median(success[:, -20:].mean(1)) > 0.6
    assert success[:, -20:].mean(1).max() > 0.8
    jax.tree.map(np.testing.assert_array_equal, frozen, before)
    for path, leaf in jax.tree.leaves_with_path(
        jax.tree.map(lambda a, b: jnp.abs(a - b[None]).max(), state.params, params)
    ):
        assert leaf > 0, jax.tree_util.keystr(path)


def test_bad_arguments_are_refused(tiny, frozen, policy):
    with pytest.raises(ValueError, match="metacontroller has width 6, expected the model's 8"):
        Controlled(LEARNER, META, layer=1)
    with pytest.raises(ValueError, match="layer is 3, expected 0"):
        Controlled(MODEL, META, layer=3)
    with pytest.raises(ValueError, match="max_switches is 0"):
        Controlled(MODEL, META, layer=1, max_switches=0)
    with pytest.raises(ValueError, match="horizon is 0"):
        InternalEnv(tiny, LEARNED, 0)
    other = PolicyConfig(inputs=D, latent=Z + 1)
    with pytest.raises(ValueError, match=r"policy has inputs and latent \(6, 4\), expected \(6, 3\)"):
        internal.abstract_rollout(CONFIG, LEARNED, other, tiny, tiny.params(), frozen, policy, jax.random.key(0))
