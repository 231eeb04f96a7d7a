"""Do codes name subgoals? Each of a few random codes is held from reset, in fresh layouts, until a colour is touched.

A code that means "go to colour 2" leads to colour 2 in every layout; one that means "go up and left" leads to whatever
lies there, and is of no use to a policy that must reach colour 2. The difference is the information between the code
and the first colour, in nats: at most the logarithm of the number of colours, a little above zero by sampling alone.
Supervised controllers do not reach that most either, since other colours lie on the way: theirs is what to compare to.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.internal_rl.config import Config
from rl.rollout import Step, rollout
from seqmod import backbone, metacontroller
from seqmod.mixers.base import Params


def first_colours(
    config: Config,
    model: Params,
    edit: Callable[[jax.Array, jax.Array], jax.Array],
    key: jax.Array,
    codes: int,
    layouts: int,
) -> np.ndarray:
    """How often (codes, colours + 1) each code leads to each colour first; last column: to none within the horizon.

    `edit` gives the stream (B, D) at the controlled layer, edited by the codes of the numbers (B,) from 0 on.
    """
    world, shape, layer = config.world, config.model, config.layer
    # Touching any colour ends an episode whose task is a single one.
    params = world.env.make_params([(0,)], world.horizon)

    def act(key: jax.Array, step: Step, memory: Any):
        lower, upper, code_B = memory
        e_BD, lower = backbone.lower_step(model, shape, step.obs_BF, lower, layer)
        outputs, upper = backbone.upper_step(model, shape, edit(e_BD, code_B), upper, layer)
        return jax.random.categorical(key, outputs["action"]), (lower, upper, code_B), None

    def run(key: jax.Array) -> jax.Array:
        episodes = codes * layouts
        memory = (
            backbone.init_state(shape, episodes, world.horizon, stop=layer),
            backbone.init_state(shape, episodes, world.horizon, start=layer),
            jnp.repeat(jnp.arange(codes), layouts),
        )
        final = rollout(key, world.env, params, act, memory, episodes, world.horizon)[0].final_state
        return jax.vmap(world.env.colour_at)(final.agent, final.objects_J)

    colour_CL = np.asarray(jax.jit(run)(key)).reshape(codes, layouts)
    return np.stack([(colour_CL == colour).sum(1) for colour in (*range(world.colours), -1)], axis=1)


def information(counts_CO: np.ndarray) -> float:
    """Mutual information, in nats, of row and column of a table of counts (plug-in estimate)."""
    joint = counts_CO / counts_CO.sum()
    apart = joint.sum(1, keepdims=True) * joint.sum(0, keepdims=True)
    seen = joint > 0
    return float((joint[seen] * np.log(joint[seen] / apart[seen])).sum())


def measure(
    config: Config, model: Params, controller: Params, key: jax.Array, codes: int = 16, layouts: int = 256
) -> dict[str, Any]:
    """What codes name that are drawn as the untrained policy of internal RL draws them.

    `information` between code and first colour, `by_sampling` what independence would give on average (Miller and
    Madow's first-order bias), `at_most` the logarithm of the number of colours, and the `counts`.
    """
    k_codes, k_run = jax.random.split(key)
    z_CZ = config.reinforce.initial_std * jax.random.normal(k_codes, (codes, config.discover.metacontroller.latent))

    def edit(e_BD: jax.Array, code_B: jax.Array) -> jax.Array:
        return metacontroller.control(controller, e_BD, z_CZ[code_B])

    counts_CO = first_colours(config, model, edit, k_run, codes, layouts)
    outcomes = int((counts_CO.sum(0) > 0).sum())
    return {
        "information": information(counts_CO),
        "by_sampling": (codes - 1) * (outcomes - 1) / (2 * codes * layouts),
        "at_most": float(np.log(config.world.colours)),
        "counts": counts_CO.tolist(),
    }
