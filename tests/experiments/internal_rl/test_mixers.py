"""Every causal mixer as the base model: the programs of all stages are built, as XLA would get them, though not run."""

from dataclasses import replace

import jax
import pytest

from experiments.internal_rl import discover, pretrain, reinforce
from experiments.internal_rl.presets import tiny
from rl import grpo, internal
from rl.internal import Frozen
from seqmod import backbone, metacontroller, train
from seqmod.mixers import MIXERS

pytestmark = pytest.mark.slow

CAUSAL = [name for name, mixer in MIXERS.items() if "causal self" in mixer.patterns]


def shapes(tree):
    return jax.tree.map(lambda x: (x.shape, x.dtype), tree)


@pytest.mark.parametrize("name", CAUSAL)
def test_every_stage_takes_the_mixer(name):
    config = replace(tiny(), base=replace(tiny().base, mixer=name))
    key = jax.random.key(0)
    params = jax.eval_shape(lambda: backbone.init(key, config.model))
    meta = jax.eval_shape(lambda: metacontroller.init(key, config.discover.metacontroller))

    tx = config.pretrain.optimiser.make()
    chunk = train.make_chunk(
        pretrain.sampler(config, 4), lambda params, demos, key, step: pretrain.loss(config, params, demos), tx, 2
    )
    state = jax.eval_shape(lambda params: train.start(params, tx, key), params)
    after, metrics = jax.eval_shape(chunk, state)
    assert shapes(after) == shapes(state)
    assert metrics["loss"].shape == (2,)

    def sweep(params, meta):
        run, begun = discover.sweeper(config, params, meta, 2)
        return begun, run(begun)[0]

    begun, after = jax.eval_shape(sweep, params, meta)
    assert shapes(after) == shapes(begun)

    settings, env, env_params = config.reinforce, config.world.env, config.world.post_training_params
    policy, shape = reinforce.policy_config(config), reinforce.controlled(config)

    def internal_update(params, meta):
        state = grpo.start(settings.grpo, internal.init_policy(key, policy), key)
        after, _ = internal.internal_update(
            settings.grpo, shape, policy, env, env_params, Frozen(params, meta), state, settings.learning_rate
        )
        return state, after

    def raw_update(params):
        state = grpo.start(settings.raw_grpo, params, key)
        rate = settings.raw_learning_rate
        return state, grpo.raw_update(settings.raw_grpo, config.model, env, env_params, state, rate)[0]

    for state, after in (jax.eval_shape(internal_update, params, meta), jax.eval_shape(raw_update, params)):
        assert shapes(after) == shapes(state)
