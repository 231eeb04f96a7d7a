"""Networks of the algorithms: a torso (MLP, CNN, or any causal sequence model as a memory) and heads.

A network is three functions of arrays, and works for any number of leading axes that its memory has:

    params = init(key);   memory = init_memory(B);   outputs, memory = step(params, obs_B, memory)

Without memory (), `step` may be given any leading axes at once. `unroll` runs a network over a rollout, resetting the
memory where episodes begin.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np

from rl.policies import Categorical, Gaussian, Policy, SquashedGaussian
from seqmod import backbone
from seqmod.config import BackboneConfig

Params = Any
Activation = Literal["tanh", "relu", "silu"]
Initialisation = Literal["orthogonal", "lecun"]
_ACTIVATIONS = {"tanh": jnp.tanh, "relu": jax.nn.relu, "silu": jax.nn.silu}


class Network(NamedTuple):
    """`init(key) -> params`, `init_memory(B) -> memory` (leaves (B, ...)), `step(params, obs_B, memory) -> (outputs,
    memory)`; `recurrent` says whether there is a memory. An observation is whatever the environment gives, an array or
    a pytree of them; the networks of this module take arrays."""

    init: Callable[[jax.Array], Params]
    init_memory: Callable[[int], Any]
    step: Callable[[Params, Any, Any], tuple[Any, Any]]
    recurrent: bool = False


def feed_forward(init: Callable[[jax.Array], Params], apply: Callable[[Params, Any], Any]) -> Network:
    """A network without memory from `apply(params, obs) -> outputs`, which takes any leading axes."""
    return Network(init, lambda batch: (), lambda params, obs, memory: (apply(params, obs), memory))


def _check(name: str, activation: str, **sizes: tuple[int, ...]) -> None:
    if activation not in _ACTIVATIONS:
        raise ValueError(f"{name}: activation is {activation!r}, expected one of {sorted(_ACTIVATIONS)}")
    for field, values in sizes.items():
        if any(value < 1 for value in values):
            raise ValueError(f"{name}: {field} is {values}, expected positive numbers")


@dataclass(frozen=True)
class MLP:
    """Hidden layers of an MLP over the flattened observation.

    They begin orthogonal with a scale of sqrt 2 and heads smaller, as in Huang et al. (2022), or, heads too, uniform
    with a variance of one over the inputs (LeCun et al., "Efficient BackProp", 1998), as in Brax.
    """

    hidden: tuple[int, ...] = (64, 64)
    activation: Activation = "tanh"
    initialisation: Initialisation = "orthogonal"

    def __post_init__(self) -> None:
        _check("MLP", self.activation, hidden=self.hidden)
        if self.initialisation not in get_args(Initialisation):
            raise ValueError(
                f"MLP: initialisation is {self.initialisation!r}, expected one of {get_args(Initialisation)}"
            )


@dataclass(frozen=True)
class CNN:
    """Convolutions without padding over images (H, W, C), then an MLP; as used for MinAtar (Young and Tian, 2019)."""

    channels: tuple[int, ...] = (16,)
    kernel: int = 3
    hidden: tuple[int, ...] = (128,)
    activation: Activation = "relu"

    def __post_init__(self) -> None:
        _check("CNN", self.activation, channels=self.channels, hidden=self.hidden, kernel=(self.kernel,))
        if not self.channels:
            raise ValueError("CNN: channels is empty, expected at least one layer")


@dataclass(frozen=True)
class Memory:
    """A causal sequence model over the flattened observations of an episode, with an MLP before it.

    Of `backbone`, inputs and heads are set here. Its `context` bounds the episodes that attention can look back on; a
    recurrence has no bound. In learning the model runs step by step, so its memory in the backward pass is that of
    a rollout's states: small for a recurrence, a cache for each step for attention.
    """

    backbone: BackboneConfig = BackboneConfig(inputs=1, mixers=("rglru",), width=64, mlp=128)
    embed: MLP = MLP((64,), "relu")


Torso = MLP | CNN | Memory


def init_dense(
    key: jax.Array,
    inputs: int,
    outputs: int,
    scale: float = math.sqrt(2),
    initialisation: Initialisation = "orthogonal",
) -> Params:
    """A layer with an orthogonal matrix of the given scale, or LeCun's uniform one, which has none."""
    lecun = initialisation == "lecun"
    kernel = jax.nn.initializers.lecun_uniform() if lecun else jax.nn.initializers.orthogonal(scale)
    return {"kernel": kernel(key, (inputs, outputs)), "bias": jnp.zeros(outputs)}


def dense(params: Params, x: jax.Array) -> jax.Array:
    """x (..., inputs) to (..., outputs)."""
    kernel = params["kernel"]
    if kernel.shape[1] < 16:
        # The gradient of the transpose is what XLA computes fast on a CPU, some ten times faster for a few outputs.
        rows = jax.lax.optimization_barrier(kernel.T)
        y = jax.lax.dot_general(x, rows, (((x.ndim - 1,), (1,)), ((), ())))
    else:
        y = jnp.dot(x, kernel)
    return y + params["bias"].reshape((1,) * (y.ndim - 1) + (-1,))


def init_mlp(key: jax.Array, config: MLP, inputs: int, outputs: int | None = None, scale: float = 1.0) -> Params:
    """Hidden layers, then a linear one to `outputs` of the given scale, if any."""
    sizes = (inputs, *config.hidden)
    keys = [*jax.random.split(key, len(sizes))]
    kind = config.initialisation
    layers = [init_dense(k, a, b, initialisation=kind) for k, a, b in zip(keys, sizes[:-1], sizes[1:], strict=False)]
    return layers if outputs is None else [*layers, init_dense(keys[-1], sizes[-1], outputs, scale, kind)]


def mlp(params: Params, config: MLP, x: jax.Array) -> jax.Array:
    """x (..., inputs) to (..., outputs)."""
    for index, layer in enumerate(params):
        x = dense(layer, x)
        if index < len(config.hidden):
            x = _ACTIVATIONS[config.activation](x)
    return x


def torso(config: Torso, obs_shape: tuple[int, ...]) -> tuple[Network, int]:
    """A network from observations (..., *obs_shape) to features (..., D), and D."""
    match config:
        case MLP():
            inputs = math.prod(obs_shape)
            size = config.hidden[-1] if config.hidden else inputs
            return feed_forward(
                lambda key: init_mlp(key, config, inputs),
                lambda params, obs: mlp(params, config, _flat(obs, obs_shape)),
            ), size
        case CNN():
            return _cnn(config, obs_shape)
        case Memory():
            return _memory(config, obs_shape)


def actor_critic(
    obs_shape: tuple[int, ...],
    action_space: Any,
    config: Torso = MLP(),
    *,
    critic: Torso | None = None,
    shared: bool = False,
    log_std: float = 0.0,
    squashed: bool = False,
) -> Network:
    """A network whose outputs are (policy, value (...)): a `Policy` over a gymnax Discrete or Box space, for which
    policy and value have torsos of their own unless `shared`, the value's that of `critic` if given. A memory is
    always shared.

    Of a Box's actions the log of the standard deviation starts at `log_std`, and is one parameter for each action. A
    `squashed` policy is a `SquashedGaussian` instead, whose standard deviation depends on the observation. Raises
    ValueError for a Box whose actions are no vectors, and for a `critic` where the torso is shared."""
    discrete = is_discrete(action_space)
    actions = action_space.n if discrete else _action_size("actor_critic", action_space)
    body, size = torso(config, obs_shape)
    shared = shared or body.recurrent
    judge, judge_size = torso(critic or config, obs_shape)
    if critic is not None and (shared or judge.recurrent):
        raise ValueError("actor_critic: a critic of its own has no part in a shared torso or a memory")
    squashed = squashed and not discrete
    kind, judge_kind = _heads(config), _heads(critic or config)

    def init(key: jax.Array) -> Params:
        k_actor, k_critic, k_policy, k_value = jax.random.split(key, 4)
        params = {
            "torso": body.init(k_actor),
            "policy": init_dense(k_policy, size, 2 * actions if squashed else actions, 0.01, kind),
            "value": init_dense(k_value, judge_size, 1, 1.0, judge_kind),
        }
        if not shared:
            params["critic"] = judge.init(k_critic)
        if squashed:
            # The inverse of the softplus in `step`.
            params["policy"]["bias"] = (
                params["policy"]["bias"].at[actions:].set(math.log(math.expm1(math.exp(log_std))))
            )
        elif not discrete:
            params["log_std"] = jnp.full(actions, log_std)
        return params

    def step(params: Params, obs: jax.Array, memory: Any) -> tuple[tuple[Policy, jax.Array], Any]:
        features, memory = body.step(params["torso"], obs, memory)
        seen = features if shared else judge.step(params["critic"], obs, ())[0]
        value = dense(params["value"], seen)[..., 0]
        y = dense(params["policy"], features)
        if discrete:
            return (Categorical(y), value), memory
        if squashed:
            mean, spread = jnp.split(y, 2, axis=-1)
            return (SquashedGaussian(mean, jnp.log(jax.nn.softplus(spread) + 1e-3)), value), memory
        spread = jnp.broadcast_to(params["log_std"].reshape((1,) * (y.ndim - 1) + (-1,)), y.shape)
        return (Gaussian(y, spread), value), memory

    return Network(init, body.init_memory, step, body.recurrent)


def q_network(
    obs_shape: tuple[int, ...], action_space: Any, config: Torso = MLP(), *, dueling: bool = False
) -> Network:
    """A network whose outputs are the values (..., A) of a gymnax Discrete space's actions; `dueling` as in Wang et
    al., arXiv 1511.06581, equation 9. Raises ValueError for another space."""
    if not is_discrete(action_space):
        raise ValueError(f"q_network: action space is {type(action_space).__name__}, expected a Discrete")
    body, size = torso(config, obs_shape)

    def init(key: jax.Array) -> Params:
        k_torso, k_action, k_value = jax.random.split(key, 3)
        params = {"torso": body.init(k_torso), "action": init_dense(k_action, size, action_space.n, 1.0)}
        return params | {"value": init_dense(k_value, size, 1, 1.0)} if dueling else params

    def step(params: Params, obs: jax.Array, memory: Any) -> tuple[jax.Array, Any]:
        features, memory = body.step(params["torso"], obs, memory)
        q_A = dense(params["action"], features)
        if dueling:
            q_A = dense(params["value"], features) + q_A - q_A.mean(-1, keepdims=True)
        return q_A, memory

    return Network(init, body.init_memory, step, body.recurrent)


class ActorCritics(NamedTuple):
    """Networks of actions between -1 and 1: the `actor` gives (mean, log_std), each (..., A), of a Gaussian before its
    tanh; the `critics` take (obs, action) and give two values, (2, ...)."""

    actor: Network
    critics: Network


def squashed_actor_critics(
    obs_shape: tuple[int, ...], action_space: Any, config: MLP = MLP((256, 256), "relu")
) -> ActorCritics:
    """Actor and twin critics for a gymnax Box, as in SAC (Haarnoja et al., arXiv 1812.05905), over the flattened
    observation; the log of the standard deviation is kept in [-5, 2]. Raises ValueError for another space, and for a
    Box whose actions are no vectors."""
    if is_discrete(action_space):
        raise ValueError(f"squashed_actor_critics: action space is {type(action_space).__name__}, expected a Box")
    inputs, actions = math.prod(obs_shape), _action_size("squashed_actor_critics", action_space)

    def act(params: Params, obs: jax.Array) -> tuple[jax.Array, jax.Array]:
        mean, spread = jnp.split(mlp(params, config, _flat(obs, obs_shape)), 2, axis=-1)
        return mean, -5.0 + 3.5 * (jnp.tanh(spread) + 1.0)

    def judge(params: Params, obs_and_action: tuple[jax.Array, jax.Array]) -> jax.Array:
        obs, action = obs_and_action
        x = jnp.concatenate([_flat(obs, obs_shape), action], axis=-1)
        return jax.vmap(lambda params: mlp(params, config, x)[..., 0])(params)

    def init_critics(key: jax.Array) -> Params:
        two = [init_mlp(k, config, inputs + actions, 1) for k in jax.random.split(key)]
        return jax.tree.map(lambda *x: jnp.stack(x), *two)

    return ActorCritics(
        feed_forward(lambda key: init_mlp(key, config, inputs, 2 * actions, 0.01), act),
        feed_forward(init_critics, judge),
    )


def is_discrete(action_space: Any) -> bool:
    """Whether a gymnax space is Discrete. Raises ValueError for what is neither that nor a Box."""
    if hasattr(action_space, "n"):
        return True
    if hasattr(action_space, "low"):
        return False
    raise ValueError(f"action space is {type(action_space).__name__}, expected a Discrete or a Box")


def _heads(config: Torso) -> Initialisation:
    return config.initialisation if isinstance(config, MLP) else "orthogonal"


def _action_size(name: str, box: Any) -> int:
    if len(box.shape) != 1:
        raise ValueError(f"{name}: action space is a Box of shape {box.shape}, expected (A,)")
    return box.shape[0]


def reset_memory(network: Network, memory: Any, first_B: jax.Array) -> Any:
    """The memory, blank where an episode begins."""
    if not network.recurrent:
        return memory
    blank = network.init_memory(len(first_B))
    return jax.tree.map(
        lambda new, old: jnp.where(first_B.reshape(-1, *(1,) * (old.ndim - 1)), new, old), blank, memory
    )


def unroll(network: Network, params: Params, obs_TB: Any, first_TB: jax.Array, memory: Any) -> tuple[Any, Any]:
    """Outputs (T, B, ...) and the last memory of a rollout whose episodes begin where `first_TB` is true."""
    if not network.recurrent:
        return network.step(params, obs_TB, memory)

    def one(memory: Any, x: tuple[Any, jax.Array]):
        obs_B, first_B = x
        outputs, memory = network.step(params, obs_B, reset_memory(network, memory, first_B))
        return memory, outputs

    memory, outputs = jax.lax.scan(one, memory, (obs_TB, first_TB))
    return outputs, memory


def _flat(obs: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    lead = _lead(obs, shape)
    return obs.astype(jnp.float32).reshape(*lead, math.prod(shape))


def _lead(obs: Any, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The axes of observations (..., *shape) before their own."""
    found = jax.tree.map(jnp.shape, obs)
    if not isinstance(obs, jax.Array | np.ndarray) or found[len(found) - len(shape) :] != shape:
        raise ValueError(f"the network is for observations whose last axes are {shape}, it got {found}")
    return found[: len(found) - len(shape)]


def _cnn(config: CNN, obs_shape: tuple[int, ...]) -> tuple[Network, int]:
    shrink = (config.kernel - 1) * len(config.channels)
    if len(obs_shape) != 3 or min(obs_shape[:2]) <= shrink:
        raise ValueError(
            f"CNN: observations have shape {obs_shape}, expected (H, W, C) with H and W above {shrink} "
            f"for {len(config.channels)} kernels of {config.kernel}"
        )
    inputs = (obs_shape[0] - shrink) * (obs_shape[1] - shrink) * config.channels[-1]
    head = MLP(config.hidden, config.activation)

    def init(key: jax.Array) -> Params:
        k_mlp, *keys = jax.random.split(key, len(config.channels) + 1)
        sizes = (obs_shape[-1], *config.channels)
        layers = []
        for k, a, b in zip(keys, sizes[:-1], sizes[1:], strict=True):
            layer = init_dense(k, config.kernel**2 * a, b)
            layers.append(layer | {"kernel": layer["kernel"].reshape(config.kernel, config.kernel, a, b)})
        return {"convolutions": layers, "mlp": init_mlp(k_mlp, head, inputs)}

    def apply(params: Params, obs: jax.Array) -> jax.Array:
        lead = _lead(obs, obs_shape)
        x = obs.astype(jnp.float32).reshape(-1, *obs_shape)
        for layer in params["convolutions"]:
            matrix = layer["kernel"].reshape(-1, layer["kernel"].shape[-1])
            x = dense({"kernel": matrix, "bias": layer["bias"]}, _patches(x, config.kernel))
            x = _ACTIVATIONS[config.activation](x)
        return mlp(params["mlp"], head, x.reshape(*lead, -1))

    return feed_forward(init, apply), config.hidden[-1] if config.hidden else inputs


def _patches(x: jax.Array, size: int) -> jax.Array:
    """Images (B, H, W, C) to all their squares, (B, H - size + 1, W - size + 1, size * size * C).

    A convolution as one product of matrices: within a loop on a CPU, XLA's own takes some ten times longer, and still
    longer where parameters are mapped over.
    """
    height, width = x.shape[1] - size + 1, x.shape[2] - size + 1
    return jnp.concatenate(
        [x[:, row : row + height, column : column + width] for row in range(size) for column in range(size)], axis=-1
    )


def _memory(config: Memory, obs_shape: tuple[int, ...]) -> tuple[Network, int]:
    inputs = math.prod(obs_shape)
    width = config.backbone.width
    features = config.embed.hidden[-1] if config.embed.hidden else inputs
    model = replace(config.backbone, inputs=features, vocabulary=0, heads=(("features", width),))

    def init(key: jax.Array) -> Params:
        k_embed, k_model = jax.random.split(key)
        return {"embed": init_mlp(k_embed, config.embed, inputs), "model": backbone.init(k_model, model)}

    # Each episode has a state of its own, with its own position where a mixer counts steps: episodes begin apart.
    def init_memory(batch: int) -> Any:
        one = backbone.init_state(model, 1, model.context)
        return jax.tree.map(lambda x: jnp.broadcast_to(x[None], (batch, *x.shape)), one)

    def step(params: Params, obs_B: jax.Array, memory: Any) -> tuple[jax.Array, Any]:
        x_BF = mlp(params["embed"], config.embed, _flat(obs_B, obs_shape))

        def one(x_F: jax.Array, state: Any):
            outputs, _, state = backbone.step(params["model"], model, x_F[None], state)
            return jax.nn.relu(outputs["features"][0]), state

        return jax.vmap(one)(x_BF, memory)

    return Network(init, init_memory, step, recurrent=True), width
