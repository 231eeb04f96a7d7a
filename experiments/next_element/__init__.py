"""Which mixer learns what, at what cost: next-element prediction where the best possible prediction is known.

Paper: Tax, Teinemaa & van Zelst, "An interdisciplinary comparison of sequence modeling methods for next-element
prediction" (arXiv 1811.00062), whose protocol is taken over: learn P(next element | prefix) from sequences, judge the
probabilities on others. Its data sets are replaced by generators whose exact conditional probabilities are known (a
Markov chain, a hidden Markov model, a grammar, a block-structured process), to which associative recall (Arora et al.,
arXiv 2312.04927) and copying are added; bidirectional mixers fill in hidden elements of the same.

Claim: sequence models come near the best possible prediction on all kinds of sources. Measured is the regret, nats per
element above the ideal observer on the same held-out sequences, for every mixer in the same small model. It is a smoke
test of mixers and no ranking: sizes, steps and one learning rate are small and the same for all.

Command: python -m experiments.next_element [--preset tiny|small] [--mixers NAME ...] [--out DIR] [--resume]
What was seen: seqmod/README.md. Time: some 35 seconds a mixer and direction, half of it compilation, on one CPU core.
"""
