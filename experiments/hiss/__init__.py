"""Hierarchical state-space models on sensors: a model on chunks of fast samples below a model on the chunks.

Paper: Bhirangi et al., "Hierarchical State Space Models for Continuous Sequence-to-Sequence Modeling" (HiSS, arXiv
2402.10211). Its recordings are replaced by a generator: hidden velocities at a low rate, and at ten times that rate
sensors that mix them, shake, drift and are noisy. The error is the mean squared one of the velocities, whose variance
is 1.

Claim: with the same mixer and number of blocks, the hierarchy's error is below that of the flat model, and more so
where more of the signal is fast and says nothing of the target. Flat models are read at the last sample of each chunk,
which has seen what the hierarchy has; the published code reads at the first, and "MIXER:first" does as well.

Command: python -m experiments.hiss [--preset tiny|small] [--models NAME ...] [--out DIR] [--resume]
What was seen: experiments/README.md.
"""
