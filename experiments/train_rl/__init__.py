"""Any algorithm of `rl` in any environment of `rl.envs`, from the command line.

    python -m experiments.train_rl --env CartPole-v1 --algo ppo
    python -m experiments.train_rl --env Breakout-MinAtar --algo dqn --steps 1000000 --seeds 5 --out runs/breakout
    python -m experiments.train_rl --env MetaMaze-misc --algo ppo --network rglru
    python -m experiments.train_rl --env brax/ant --algo sac --help
    python -m experiments.train_rl --env CartPole-v1 --algo decision_transformer --data runs/train_rl/CartPole-v1_ppo

Claim: the algorithm learns the environment: it reaches gymnasium's threshold where there is one, and else every seed
ends above the untrained policy. Papers: those of the algorithms, named in their files.
What was seen: experiments/README.md.

Seeds are trained side by side in one compiled program, which also evaluates the greedy policy now and then. A run
directory has the configuration, the metrics as they came, checkpoints from which a killed run goes on bit for bit
(`--resume`), `result.json`, learning curves, a rendered episode, and all of it in `report.html`. What was learned comes
back in Python by

    from experiments.train_rl.load import load
    algorithm, state, env, env_params = load("runs/train_rl/CartPole-v1_ppo")

Offline algorithms (bc, decision_transformer) learn from `--data.episodes` of the greedy policies of the run that
`--data` names. The share of random actions rises from 0 in the first to `--data.random` in the last, so that returns
are mixed; a Decision Transformer is asked for the best of them. Data are gathered once and stay in the new run.

Each environment and algorithm has hyperparameters of its own, published ones where there are any (`presets`); every one
of them is a flag. `--preset tiny` shows in seconds that all of it works.
"""
