"""Run the benchmarks in turn, ours without the published ones, which need environments of their own.

Command: python -m experiments.bench
"""

import tempfile
from pathlib import Path

from experiments.bench import internal_rl, kernels, mixers, rl

if __name__ == "__main__":
    internal_rl.main()
    kernels.main()
    mixers.main()
    # Not the file beside the module: its rows are of another machine, and would not be measured again.
    with tempfile.TemporaryDirectory() as folder:
        rl.main(contenders=(rl.OURS,), out=Path(folder) / "rl.json")
