"""Presets: `tiny` runs every line in a minute, `small` shows the result on two CPU cores, `paper` is the paper's."""

from experiments.internal_rl.config import Base, Config, Control, Discover, Pretrain, Probe, Reinforce, World
from rl.envs.gridworld_pinpad import PAPER_POST_TRAINING, PAPER_PRETRAINING
from rl.grpo import GRPOConfig
from seqmod.metacontroller import MetacontrollerConfig
from seqmod.train import AdamWConfig


def tiny() -> Config:
    """A 4 x 4 grid and a few steps of everything: for tests, not for conclusions."""
    few = AdamWConfig(learning_rate=3e-3, steps=20, batch=8, warmup=2)
    grpo = GRPOConfig(batch=16, horizon=16, minibatches=2, epochs=1)
    return Config(
        world=World(size=4, colours=3, walls=1, task_length=2, post_training="012", withheld=(), horizon=16, window=12),
        base=Base(layers=2, width=16, mlp=32, heads=2, context=24),
        pretrain=Pretrain(optimiser=few, chunk=10, snapshots=(0.5,)),
        probe=Probe(optimiser=few),
        control=Control(optimiser=few, rank=2, episodes=64, raw_episodes=64),
        discover=Discover(
            learn_steps=20,
            learn_batch=8,
            optimiser=few,
            metacontroller=MetacontrollerConfig(
                width=16,
                latent=4,
                history=8,
                embedding=8,
                encoder_hidden=16,
                switch_hidden=16,
                rank=4,
                embedder_width=16,
            ),
            held_out=32,
        ),
        reinforce=Reinforce(
            grpo=grpo, raw_grpo=grpo, updates=4, seeds=2, chunk=2, max_switches=8, policy_width=16, forced_baseline=True
        ),
        layer=1,
    )


def small() -> Config:
    """The default: a 12 x 12 grid where a subgoal lasts eight steps, on two CPU cores."""
    return Config()


def paper() -> Config:
    """The paper's grid world and hyperparameters (Tables A1, A4, A9, A13, A16)."""
    return Config(
        world=World(
            size=7,
            colours=8,
            walls=4,
            coding="absolute",
            subgoal_colours=2,
            pretraining=tuple("".join(map(str, task)) for task in PAPER_PRETRAINING),
            post_training="".join(map(str, PAPER_POST_TRAINING)),
            withheld=(),
            horizon=100,
            window=100,
        ),
        base=Base(layers=6, width=256, mlp=512, heads=4, context=128, init_scale=0.1),
        pretrain=Pretrain(
            optimiser=AdamWConfig(learning_rate=3e-4, weight_decay=0.03, steps=256_000, batch=1024),
            observation_weight=0.01,
            snapshots=(0.01, 0.05, 0.25),
        ),
        probe=Probe(optimiser=AdamWConfig(learning_rate=1e-3, weight_decay=0.0, steps=8000, batch=512)),
        control=Control(
            optimiser=AdamWConfig(learning_rate=1e-3, weight_decay=0.0, steps=3200, batch=512),
            episodes=4096,
            raw_episodes=1_048_576,
        ),
        discover=Discover(
            optimiser=AdamWConfig(learning_rate=1e-3, weight_decay=0.03, steps=64_000, batch=512),
            metacontroller=MetacontrollerConfig(width=256, embedder_width=256),
            alphas=(0.0, 0.05, 0.1, 0.17, 0.3, 0.5, 1.0),
            chosen=0.17,
            learn_steps=0,
            ramp=0.0,
            turned_view=False,
        ),
        reinforce=Reinforce(
            grpo=GRPOConfig(batch=1024),
            raw_grpo=GRPOConfig(batch=1024),
            updates=1000,
            learning_rate=3e-5,
            raw_learning_rate=3e-5,
            policy_width=256,
            initial_std=1.0,
            max_switches=100,
        ),
        layer=3,
    )


PRESETS = {"tiny": tiny, "small": small, "paper": paper}
