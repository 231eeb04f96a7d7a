"""Run every benchmark in turn.

Command: python -m experiments.bench
"""

from experiments.bench import internal_rl, kernels, mixers

if __name__ == "__main__":
    internal_rl.main()
    kernels.main()
    mixers.main()
