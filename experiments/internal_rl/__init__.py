"""Internal RL: temporally abstract actions found in a frozen sequence model's residual stream, and reinforced there.

Claim: a causal sequence model trained to predict the actions of agents whose goals are hidden represents those goals in
its residual stream; a metacontroller finds, without labels, codes that are held for a whole subgoal; reinforcement
learning on the codes solves a sparse-reward task, with subgoal transitions that no demonstration has, on which
reinforcement learning on the model's own actions gets nowhere.

Paper: Kobayashi et al., "Emergent temporal abstractions in autoregressive models enable hierarchical reinforcement
learning", arXiv 2512.20605.

Command: python -m experiments.internal_rl [--preset tiny|small|paper] [--seed N] [--seeds K] [--out DIR] [--resume]

What is scaled down in the `small` preset, what was seen, and how long it takes: README.md beside this file.
"""
