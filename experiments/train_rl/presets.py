"""Hyperparameters by environment and algorithm, and the returns at which an environment counts as solved.

Each preset names its source; what "as" a source deviates in is said beside it. Sources, at the commits read:

- purejaxrl: github.com/luchris429/purejaxrl at 31756b1, files of purejaxrl/ and examples/;
- rejax: github.com/keraJLi/rejax at d751095, configs/;
- zoo: github.com/DLR-RM/rl-baselines3-zoo, hyperparams/.

What none of them has is our own choice, and says so. Details of their algorithms are not taken over: rejax's PPO clips
the change of values and each gradient's entries; the library of zoo has no factor 1/2 in the loss of values, so that
its coefficient is worth twice ours, and in A2C RMSprop's epsilon outside the root.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

from experiments.train_rl.algorithms import NetworkOptions
from rl.a2c import A2CConfig, A2CHyper
from rl.bc import BCConfig, BCHyper
from rl.decision_transformer import DTConfig, DTHyper
from rl.dqn import DQNConfig, DQNHyper
from rl.group import GroupConfig, GroupHyper
from rl.ppo import PPOConfig, PPOHyper
from rl.sac import SACConfig, SACHyper


class Preset(NamedTuple):
    """Static `config` (its number of updates is set from `steps`), traced `hyper`, `network`; `steps` of each of the
    `seeds`, of the environment, or, offline, of the gradient; `evaluations` of as many `episodes`; and where the
    hyperparameters come from."""

    config: Any
    hyper: Any
    network: NetworkOptions
    steps: int
    source: str
    seeds: int = 3
    evaluations: int = 20
    episodes: int = 32


THRESHOLDS: Mapping[str, float] = {
    "CartPole-v1": 475.0,
    "Acrobot-v1": -100.0,
    "MountainCar-v0": -110.0,
    "MountainCarContinuous-v0": 90.0,
}
"""Mean returns that gymnasium 1.3 has registered as solved (reward_threshold), for environments that are the same."""

_TANH = NetworkOptions()
_SILU = NetworkOptions(activation="silu")
_DUELING = NetworkOptions(activation="silu", dueling=True)
_IMAGE = NetworkOptions(hidden=(128,), activation="relu")
# Brax in small: few environments, as batches gain nothing on a CPU.
_BRAX = {"seeds": 1, "evaluations": 10, "episodes": 8}

_REJAX_PPO = PPOConfig(environments=5, steps=100, epochs=5, minibatches=5, anneal=False)
_ZOO_A2C = A2CConfig(environments=16, steps=5, anneal=False, normalise_observations=True, normalise_rewards=True)
# With minibatches of 640 steps, as a sixteenth of the environments have them there.
_BRAX_PPO = PPOConfig(
    environments=256,
    steps=80,
    epochs=4,
    minibatches=32,
    anneal=False,
    normalise_observations=True,
    normalise_rewards=True,
    resets=16,
)
_SQUASHED = NetworkOptions(hidden=(256, 256), activation="silu", log_std=-0.37, squashed=True)
_AS_BRAX = replace(_SQUASHED, hidden=(32,) * 4, critic=(256,) * 5, initialisation="lecun")

PRESETS: Mapping[tuple[str, str], Preset] = {
    ("CartPole-v1", "ppo"): Preset(
        PPOConfig(environments=8, steps=32, epochs=20, minibatches=1),
        PPOHyper(learning_rate=1e-3, discount=0.98, lambda_=0.8, entropy=0.0),
        _TANH,
        100_000,
        "zoo ppo.yml, whose clip falls to 0 as well",
    ),
    ("Acrobot-v1", "ppo"): Preset(
        replace(_REJAX_PPO, normalise_observations=True),
        PPOHyper(learning_rate=7.5e-4, entropy=0.01),
        _TANH,
        300_000,
        "rejax gymnax/acrobot.yaml, three times as long",
    ),
    ("MountainCar-v0", "ppo"): Preset(
        PPOConfig(
            environments=16,
            steps=16,
            epochs=4,
            minibatches=4,
            anneal=False,
            normalise_observations=True,
            normalise_rewards=True,
        ),
        PPOHyper(learning_rate=3e-4, lambda_=0.98, entropy=0.0),
        _TANH,
        1_000_000,
        "zoo ppo.yml, with the batch size and learning rate that are its library's defaults",
    ),
    ("MountainCarContinuous-v0", "ppo"): Preset(
        replace(_REJAX_PPO, epochs=10, minibatches=10, max_grad_norm=10.0),
        PPOHyper(learning_rate=3e-4, discount=0.9, entropy=0.0),
        NetworkOptions(activation="relu"),
        200_000,
        "rejax gymnax/continuous_mountaincar.yaml",
    ),
    ("Pendulum-v1", "ppo"): Preset(
        PPOConfig(
            environments=100,
            steps=100,
            epochs=10,
            minibatches=10,
            max_grad_norm=10.0,
            anneal=False,
            normalise_observations=True,
            normalise_rewards=True,
        ),
        PPOHyper(learning_rate=1e-3, discount=0.9, entropy=0.0),
        _SILU,
        150_000,
        "rejax gymnax/pendulum.yaml, with the discount of zoo ppo.yml and normalised rewards",
    ),
    ("MinAtar", "ppo"): Preset(
        PPOConfig(environments=64, steps=128, epochs=4, minibatches=8),
        PPOHyper(learning_rate=5e-3, entropy=0.01),
        _IMAGE,
        10_000_000,
        "purejaxrl examples/brax_minatar.ipynb, which has an MLP",
        seeds=1,
    ),
    ("FourRooms-misc", "ppo"): Preset(
        PPOConfig(environments=64, steps=64, epochs=4, minibatches=4),
        PPOHyper(learning_rate=1e-3, entropy=0.01),
        _TANH,
        1_000_000,
        "own choice",
    ),
    # Its raw observations hold the time, up to 200, and rewards of 10.
    ("MetaMaze-misc", "ppo"): Preset(
        PPOConfig(
            environments=64,
            steps=128,
            epochs=4,
            minibatches=4,
            normalise_observations=True,
            normalise_rewards=True,
        ),
        PPOHyper(learning_rate=1e-3, entropy=0.01),
        _TANH,
        1_000_000,
        "own choice",
    ),
    ("brax", "ppo"): Preset(
        # Normalised rewards were as good with the backend spring, and worse with mjx.
        replace(_BRAX_PPO, normalise_rewards=False),
        # Brax sums advantages over unrolls of 5 steps: about what a trace of .7 does.
        PPOHyper(learning_rate=3e-4, discount=0.97, lambda_=0.7, clip=0.3, entropy=0.01),
        _AS_BRAX,
        1_000_000,
        "Brax's notebook for ant, with a sixteenth of its environments and a trace of .7",
        **_BRAX,
    ),
    ("brax/halfcheetah", "ppo"): Preset(
        replace(_BRAX_PPO, environments=128, steps=160, epochs=8, resets=8),
        PPOHyper(learning_rate=3e-4, discount=0.95, clip=0.3, entropy=0.001),
        _SQUASHED,
        1_000_000,
        "Brax's notebook for halfcheetah, with a sixteenth of its environments, normalised rewards, own networks",
        **_BRAX,
    ),
    ("*", "ppo"): Preset(
        PPOConfig(environments=16, steps=128, epochs=4, minibatches=4),
        PPOHyper(learning_rate=5e-4, entropy=0.01),
        _TANH,
        500_000,
        "own choice",
    ),
    ("CartPole-v1", "a2c"): Preset(
        A2CConfig(environments=8, steps=5, anneal=False),
        A2CHyper(learning_rate=7e-4, entropy=0.0),
        _TANH,
        500_000,
        "zoo a2c.yml and its library's defaults",
    ),
    ("Acrobot-v1", "a2c"): Preset(
        _ZOO_A2C,
        A2CHyper(learning_rate=7e-4, entropy=0.0),
        _TANH,
        500_000,
        "zoo a2c.yml and its library's defaults",
    ),
    ("MountainCar-v0", "a2c"): Preset(
        _ZOO_A2C,
        A2CHyper(learning_rate=7e-4, entropy=0.0),
        _TANH,
        1_000_000,
        "zoo a2c.yml and its library's defaults",
    ),
    ("MinAtar", "a2c"): Preset(A2CConfig(), A2CHyper(entropy=0.01), _IMAGE, 5_000_000, "own choice", seeds=1),
    ("brax", "a2c"): Preset(
        replace(_ZOO_A2C, environments=64, steps=16), A2CHyper(entropy=0.0), _TANH, 1_000_000, "own choice", **_BRAX
    ),
    ("*", "a2c"): Preset(A2CConfig(), A2CHyper(), _TANH, 500_000, "own choice"),
    ("*", "group"): Preset(GroupConfig(), GroupHyper(), _TANH, 500_000, "own choice"),
    ("CartPole-v1", "dqn"): Preset(
        DQNConfig(
            environments=10,
            steps=10,
            capacity=50_000,
            learning_starts=5_000,
            gradient_steps=5,
            batch=100,
            target_period=5,
        ),
        DQNHyper(learning_rate=1e-3, tau=0.02, exploration=0.5, huber=1e6),
        _DUELING,
        100_000,
        "rejax gymnax/cartpole.yaml",
    ),
    ("MountainCar-v0", "dqn"): Preset(
        DQNConfig(
            environments=5,
            steps=10,
            capacity=10_000,
            learning_starts=1_000,
            gradient_steps=5,
            batch=100,
            target_period=200,
        ),
        DQNHyper(learning_rate=5e-3, discount=1.0, exploration=0.5),
        replace(_DUELING, activation="tanh"),
        100_000,
        "rejax gymnax/mountaincar.yaml; it moves the target by 1 % every 200 environment steps",
    ),
    ("MinAtar", "dqn"): Preset(
        DQNConfig(
            environments=16,
            capacity=100_000,
            learning_starts=5_008,
            batch=32,
            target_period=1_000,
            replay_dtype="uint8",
        ),
        DQNHyper(learning_rate=2.5e-4, epsilon_end=0.1, exploration=0.1),
        _IMAGE,
        1_000_000,
        "own choice",
        seeds=1,
    ),
    ("Pendulum-v1", "sac"): Preset(
        SACConfig(
            environments=1,
            steps=50,
            capacity=10_000,
            learning_starts=256,
            gradient_steps=1,
            batch=256,
            normalise_observations=True,
        ),
        SACHyper(learning_rate=1e-2, tau=0.02),
        _SILU,
        10_000,
        "rejax gymnax/pendulum.yaml",
    ),
    ("MountainCarContinuous-v0", "sac"): Preset(
        SACConfig(environments=32, steps=10, capacity=10_016, learning_starts=256, gradient_steps=32, batch=256),
        SACHyper(learning_rate=5e-3, tau=0.01),
        _SILU,
        50_000,
        "rejax gymnax/continuous_mountaincar.yaml",
    ),
    ("brax", "sac"): Preset(
        SACConfig(
            environments=16,
            steps=32,
            capacity=262_144,
            learning_starts=8_192,
            gradient_steps=8,
            batch=256,
            normalise_observations=True,
        ),
        SACHyper(learning_rate=3e-4, discount=0.98),
        NetworkOptions(hidden=(256, 256), activation="relu"),
        500_000,
        "own choice",
        **_BRAX,
    ),
    ("*", "sac"): Preset(
        SACConfig(), SACHyper(), NetworkOptions(hidden=(256, 256), activation="relu"), 100_000, "own choice", seeds=1
    ),
    ("*", "dqn"): Preset(
        DQNConfig(capacity=65_536, gradient_steps=4, batch=64, target_period=1, anneal=True),
        DQNHyper(tau=0.02, huber=100.0),
        NetworkOptions(activation="relu"),
        100_000,
        "own choice",
    ),
    ("*", "bc"): Preset(BCConfig(), BCHyper(), _TANH, 2_000, "own choice"),
    ("*", "decision_transformer"): Preset(
        DTConfig(batch=32, context=10),
        DTHyper(),
        NetworkOptions(network="attention", layers=2),
        1_000,
        "own choice",
        evaluations=10,
    ),
}
"""By a name, by a family of environments (MinAtar, brax), or for all others (*)."""

_TINY = {"network": NetworkOptions(hidden=(5,)), "source": "small", "seeds": 2, "evaluations": 3, "episodes": 2}
TINY: Mapping[str, Preset] = {
    "ppo": Preset(PPOConfig(environments=2, steps=7, epochs=1, minibatches=2), PPOHyper(), steps=84, **_TINY),
    "a2c": Preset(A2CConfig(environments=2, steps=7), A2CHyper(), steps=84, **_TINY),
    "group": Preset(
        GroupConfig(groups=2, episodes=2, horizon=7, epochs=1, minibatches=2), GroupHyper(), steps=84, **_TINY
    ),
    "dqn": Preset(
        DQNConfig(environments=2, steps=7, capacity=50, learning_starts=10, batch=3), DQNHyper(), steps=84, **_TINY
    ),
    "sac": Preset(
        SACConfig(environments=2, steps=7, capacity=50, learning_starts=10, gradient_steps=1, batch=3),
        SACHyper(),
        steps=84,
        **_TINY,
    ),
    "bc": Preset(BCConfig(gradient_steps=2, batch=3), BCHyper(), steps=12, **_TINY),
    "decision_transformer": Preset(
        DTConfig(gradient_steps=2, batch=3, context=2, horizon=5), DTHyper(), steps=12, **_TINY
    )._replace(network=NetworkOptions(network="rglru", width=8)),
}
"""To see in seconds that everything runs."""


def preset(env: str, algo: str) -> Preset:
    """The preset of an environment, or of its family, or of the algorithm."""
    family = "brax" if env.startswith("brax/") else env.rpartition("-")[2]
    return next(PRESETS[name, algo] for name in (env, family, "*") if (name, algo) in PRESETS)
