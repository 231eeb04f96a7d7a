"""The algorithms that can be asked for by name, and the network that each of them learns with."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

from rl import a2c, bc, decision_transformer, dqn, group, ppo, sac
from rl.algorithm import Algorithm
from rl.networks import (
    CNN,
    MLP,
    Initialisation,
    Memory,
    Network,
    Torso,
    actor_critic,
    is_discrete,
    q_network,
    squashed_actor_critics,
)
from seqmod.config import BackboneConfig
from seqmod.mixers import MIXERS

Activation = Literal["tanh", "relu", "silu"]


@dataclass(frozen=True)
class NetworkOptions:
    """What the policy is computed by; fields that the network has no use for are ignored."""

    network: str = "auto"
    """mlp, cnn, or the name of a causal mixer of seqmod, which is then a memory; auto takes a CNN for images, else an
    MLP."""
    hidden: tuple[int, ...] = (64, 64)
    """Widths of the MLP, the one after the convolutions or before the memory included."""
    activation: Activation = "tanh"
    initialisation: Initialisation = "orthogonal"
    """Of an MLP: orthogonal with small heads, or LeCun's uniform."""
    critic: tuple[int, ...] = ()
    """Widths of the value's own MLP, where they are not those of the policy's."""
    channels: tuple[int, ...] = (16,)
    """Of the convolutions."""
    layers: int = 1
    """Blocks of a memory."""
    width: int = 64
    """Width of a memory."""
    shared: bool = False
    """One body for policy and value, which a memory is in any case."""
    log_std: float = 0.0
    """Log of the standard deviation that continuous actions start with; SAC ignores it."""
    squashed: bool = False
    """Continuous actions by tanh of a Gaussian whose standard deviation depends on the observation, as SAC's always."""
    dueling: bool = False
    """DQN: values of actions as a value of the state and advantages."""

    def torso(self, obs_shape: tuple[int, ...], horizon: int) -> Torso:
        """The body of the network, for episodes of at most `horizon` steps. Raises ValueError for an unknown one."""
        kind = self.network
        if kind == "auto":
            kind = "cnn" if len(obs_shape) == 3 else "mlp"
        if kind == "mlp":
            return MLP(self.hidden, self.activation, self.initialisation)
        if kind == "cnn":
            return CNN(self.channels, hidden=self.hidden, activation=self.activation)
        causal = sorted(name for name, mixer in MIXERS.items() if "causal self" in mixer.patterns)
        if kind not in causal:
            raise ValueError(f"--network is {kind!r}, expected auto, mlp, cnn, or one of {', '.join(causal)}")
        if self.layers < 1:
            raise ValueError(f"--layers is {self.layers}, expected at least 1")
        # Attention's distances need more than 16.
        context = max(horizon, 32)
        backbone = BackboneConfig(
            inputs=1, mixers=(kind,) * self.layers, width=self.width, mlp=2 * self.width, context=context
        )
        return Memory(backbone, MLP(self.hidden[-1:], self.activation))


class Entry(NamedTuple):
    """An algorithm's static `config` and traced `hyper` types, `make(config, env, network)`, the `network` it wants,
    the kinds of `actions` that it can choose, and whether it is `offline`: it learns from data."""

    config: type
    hyper: type
    make: Callable[[Any, Any, Any], Algorithm]
    network: Callable[[tuple[int, ...], Any, Torso, NetworkOptions], Any]
    actions: tuple[Literal["discrete", "continuous"], ...]
    offline: bool = False


def policy_network(obs_shape: tuple[int, ...], space: Any, torso: Torso, options: NetworkOptions) -> Network:
    """The actor-critic of the options, over a torso that they made."""
    own = replace(torso, hidden=options.critic) if options.critic and isinstance(torso, MLP) else None
    return actor_critic(
        obs_shape,
        space,
        torso,
        critic=None if options.shared else own,
        shared=options.shared,
        log_std=options.log_std,
        squashed=options.squashed,
    )


def _q_network(obs_shape: tuple[int, ...], space: Any, torso: Torso, options: NetworkOptions) -> Any:
    return q_network(obs_shape, space, torso, dueling=options.dueling)


def _actor_critics(obs_shape: tuple[int, ...], space: Any, torso: Torso, options: NetworkOptions) -> Any:
    if not isinstance(torso, MLP):
        raise ValueError("sac learns with MLPs: use --network mlp")
    return squashed_actor_critics(obs_shape, space, torso)


def _sequence_model(obs_shape: tuple[int, ...], space: Any, torso: Torso, options: NetworkOptions) -> Any:
    if not isinstance(torso, Memory):
        raise ValueError("decision_transformer learns with a causal mixer: use --network attention or rglru, say")
    # Three tokens a step.
    return replace(torso.backbone, context=3 * torso.backbone.context)


ALGORITHMS: Mapping[str, Entry] = {
    "ppo": Entry(ppo.PPOConfig, ppo.PPOHyper, ppo.make, policy_network, ("discrete", "continuous")),
    "a2c": Entry(a2c.A2CConfig, a2c.A2CHyper, a2c.make, policy_network, ("discrete", "continuous")),
    "group": Entry(group.GroupConfig, group.GroupHyper, group.make, policy_network, ("discrete", "continuous")),
    "dqn": Entry(dqn.DQNConfig, dqn.DQNHyper, dqn.make, _q_network, ("discrete",)),
    "sac": Entry(sac.SACConfig, sac.SACHyper, sac.make, _actor_critics, ("continuous",)),
    "bc": Entry(bc.BCConfig, bc.BCHyper, bc.make, policy_network, ("discrete", "continuous"), offline=True),
    "decision_transformer": Entry(
        decision_transformer.DTConfig,
        decision_transformer.DTHyper,
        decision_transformer.make,
        _sequence_model,
        ("discrete", "continuous"),
        offline=True,
    ),
}


def check_actions(algo: str, env: str, space: Any) -> None:
    """Raises ValueError where an algorithm cannot choose the actions of an environment, and says which can."""
    kind = "discrete" if is_discrete(space) else "continuous"
    if kind not in ALGORITHMS[algo].actions:
        able = sorted(name for name, entry in ALGORITHMS.items() if kind in entry.actions and not entry.offline)
        raise ValueError(f"{algo} cannot learn in {env}, whose actions are {kind}: use {' or '.join(able)}")
