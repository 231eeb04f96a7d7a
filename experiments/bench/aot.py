"""Compile every Pallas kernel for TPU v5e, v5p, v6e and for the H200, on a machine that has none of them.

XLA compiles for the description of a device as for the device itself. The TPU runtime knows its devices by name; the
H200 is described in `aot_cases`. Nothing is run: this finds what a compiler refuses (blocks, layouts, memory on the
chip) and shows what it reports, not that a result is right or fast.

Each runtime has an environment of its own with the JAX version of requirements.lock; `make aot` makes both. A worker in
it compiles one case after the other, the forward pass alone or the gradients of all arguments, and sends back a line
for each. A worker that its compiler ends is replaced, and the case it was at has failed.

What the compilers tell: for TPUs the vector memory that each kernel takes beside what XLA had put there, nothing of
registers; for the H200 registers and spilled bytes of a thread, by ptxas, and the shared memory that a kernel asks for.
"temp" is what a program allocates in main memory beside arguments and results. Seconds are those of this machine.

Command: make aot [ARGS="--only selective_scan --json FILE.json"], or with both environments made
python -m experiments.bench.aot [--only selective_scan] [--json FILE.json]
"""

import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib.metadata import distributions
from itertools import groupby
from json import dumps, loads
from pathlib import Path
from typing import Any, Literal

import jax
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from experiments.bench.aot_cases import TARGETS, Case, cases
from experiments.report import markdown_table

ROOT = Path(__file__).parents[2]
TOLD = ("jax", "libtpu", "jax-cuda12-plugin", "nvidia-cuda-nvcc-cu12")  # packages whose versions matter


@dataclass(frozen=True)
class Result:
    """What became of a case.

    `told` has what the compiler tells, a number for each kernel of the program: bytes of `vmem`, or `registers` and
    bytes `spilled` of a thread, and bytes of `shared` memory of a block, these in an order of their own.
    """

    outcome: Literal["compiled", "refused", "failed"]
    message: str = ""
    seconds: float = 0.0
    temp: int = 0
    told: dict[str, list[int]] = field(default_factory=dict)

    def expected(self, case: Case) -> bool:
        if case.refused is None:
            return self.outcome == "compiled"
        return self.outcome == "refused" and case.refused in self.message


def compile_case(case: Case, device: Any) -> Result:
    """Compile a program for a device that need not be here."""
    arguments = case.arguments(SingleDeviceSharding(device))
    platform = case.target.description["platform"]
    begun = time.perf_counter()
    try:
        with printed() as output:
            lowered = jax.jit(case.program).trace(arguments).lower(lowering_platforms=(platform,))
            compiled = lowered.compile()
        seconds = time.perf_counter() - begun
        told = read_ptxas(output[0]) if platform == "cuda" else read_vmem(compiled.as_text() or "")
        memory = compiled.memory_analysis()
        return Result("compiled", "", seconds, memory.temp_size_in_bytes if memory else 0, told)
    except NotImplementedError as error:
        return Result("refused", first_line(error))
    except Exception as error:  # whatever a compiler raises is what we want to know
        return Result("failed", first_line(error), time.perf_counter() - begun)


def first_line(error: Exception) -> str:
    """What went wrong, on a line: the first of the message, with the next ones while they end in a colon."""
    text = re.sub(r":\s+", ": ", f"{type(error).__name__}: {error}".strip())
    return text.partition("\n")[0][:300]


@contextmanager
def printed() -> Iterator[list[str]]:
    """A list to which, at the end, all is added that this process has printed, Python or not."""
    texts: list[str] = []
    with tempfile.TemporaryFile() as file:
        sys.stdout.flush()
        kept = os.dup(1)
        os.dup2(file.fileno(), 1)
        try:
            yield texts
        finally:
            sys.stdout.flush()
            os.dup2(kept, 1)
            os.close(kept)
            file.seek(0)
            texts.append(file.read().decode(errors="replace"))


def read_ptxas(text: str) -> dict[str, list[int]]:
    """What ptxas prints of each kernel, and the shared memory that Mosaic GPU asks for, which is not in that order."""
    patterns = {
        "registers": r"Used (\d+) registers",
        "spilled": r"stack frame, (\d+) bytes spill stores",
        "shared": r"smem_scratch_bytes=(\d+)",
    }
    return {name: [int(number) for number in re.findall(pattern, text)] for name, pattern in patterns.items()}


def read_vmem(text: str) -> dict[str, list[int]]:
    """Vector memory of each kernel in a compiled program; memory space 1 is that."""
    calls = [line for line in text.splitlines() if 'custom_call_target="tpu_custom_call"' in line]
    used = [re.search(r'"used_scoped_memory_configs":\[(.*?)\]', line) for line in calls]
    sizes = [re.findall(r'"memory_space":"1".*?"size":"(\d+)"', each[1]) if each else [] for each in used]
    return {"vmem": [sum(map(int, each)) for each in sizes]}


def work() -> None:
    """What a worker does: a line that it is there, then one for the result of each case whose index it is given."""
    devices: dict[str, Any] = {}
    print(dumps([f"{each.name} {each.version}" for each in distributions() if each.name in TOLD]), flush=True)
    every = cases()
    for index in loads(sys.argv[1]):
        target = every[index].target
        if target.name not in devices:
            devices[target.name] = topologies.get_topology_desc(**target.description).devices[0]
        print(dumps(asdict(compile_case(every[index], devices[target.name]))), flush=True)


def compile_all(chosen: Sequence[Case], python: Path, log: Path) -> Iterator[tuple[Case, Result]]:
    """Results of the workers in an environment, as they come; what compilers say goes to the log."""
    every, left = cases(), list(chosen)
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_ENABLE_COMPILATION_CACHE": "false",
        "MOSAIC_GPU_DUMP_PTXAS": "1",
        "MOSAIC_GPU_DUMP_RESOURCES": "1",
        "TPU_SKIP_MDS_QUERY": "1",
    }
    command = [str(python), "-c", "from experiments.bench import aot; aot.work()"]
    while left:
        indices = dumps([every.index(case) for case in left])
        with (
            log.open("a") as errors,
            subprocess.Popen(
                [*command, indices], cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=errors
            ) as worker,
        ):
            assert worker.stdout
            if not (versions := worker.stdout.readline()):
                raise SystemExit(f"{python} can't run the worker: see {log}")
            if len(left) == len(chosen):
                print(", ".join(sorted(loads(versions))))
            for line in worker.stdout:
                yield left.pop(0), Result(**loads(line))
        if left:
            yield left.pop(0), Result("failed", f"the compiler ended the worker, status {worker.returncode}")


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _chip(told: dict[str, list[int]]) -> str:
    """Numbers for each kernel, in units that are read easily."""
    units = {
        "vmem": ("MiB VMEM", 2**20, ".2f"),
        "registers": ("registers", 1, ".0f"),
        "spilled": ("B spilled", 1, ".0f"),
        "shared": ("KiB shared", 2**10, ".0f"),
    }
    shown = [(units[name], numbers) for name, numbers in told.items() if name != "spilled" or any(numbers)]
    return "; ".join(
        f"{', '.join(f'{number / size:{form}}' for number in numbers)} {unit}" for (unit, size, form), numbers in shown
    )


def table(results: Sequence[tuple[Case, Result]]) -> str:
    """Everything, a row a case; "chip" has one number of each kind for each kernel of the program."""
    columns = ("op", "variant", "target", "size", "dtype", "pass", "result", "s", "temp MiB", "chip")
    rows = []
    for case, result in results:
        outcome = ": ".join(each for each in (result.outcome, result.message.replace("|", "\\|")) if each)
        outcome = outcome if result.expected(case) else f"**unexpected** {outcome}"
        compiled = result.outcome == "compiled"
        numbers = (f"{result.seconds:.1f}", f"{result.temp / 2**20:.1f}") if compiled else ("", "")
        rows.append((*case.names.values(), outcome, *numbers, _chip(result.told)))
    return markdown_table(columns, rows)


def summary(results: Sequence[tuple[Case, Result]]) -> str:
    """A row a variant and a column a target: what became of its programs, and the most that a kernel takes."""
    targets = [each.name for each in TARGETS]

    def cell(group: Sequence[tuple[Case, Result]]) -> str:
        names = dict.fromkeys(name for _, result in group for name in result.told)
        most = {name: [max(max(result.told.get(name) or [0]) for _, result in group)] for name in names}
        parts = []
        for outcome in ("compiled", "refused", "failed"):
            cases = [case for case, result in group if result.outcome == outcome]
            reasons = dict.fromkeys(case.refused for case in cases if outcome == "refused" and case.refused)
            parts += [f"{len(cases)} {outcome}" + (f" ({', '.join(reasons)})" if reasons else "")] if cases else []
        return "; ".join([*parts, _chip(most)] if most else parts)

    rows = []
    for variant, group in groupby(results, key=lambda each: each[0].variant):
        group = list(group)
        cells = [cell([each for each in group if each[0].target.name == name]) for name in targets]
        rows.append((variant.op.__name__, variant.name, *cells))
    return markdown_table(("op", "variant", *targets), rows)


def main(
    only: str = "",
    json: Path | None = None,
    tpu: Path = Path(".cache/aot/tpu/bin/python"),
    gpu: Path = Path(".cache/aot/gpu/bin/python"),
) -> int:
    """Compile and print both tables; 1 if something fails, or compiles or is refused against expectation.

    `only` chooses cases with that in "op / variant / target / size / dtype / pass". `tpu` and `gpu` are the Pythons of
    the two environments; logs are written beside them.
    """
    found: dict[int, Result] = {}
    chosen, every = cases(only), cases()
    for runtime, python in (("tpu", tpu), ("gpu", gpu)):
        log = python.parents[1] / "log"
        log.unlink(missing_ok=True)
        for case, result in compile_all([each for each in chosen if each.target.runtime == runtime], python, log):
            found[every.index(case)] = result
            say(f"{' / '.join(case.names.values())}: {result.outcome} {result.message}")
    results = [(every[index], found[index]) for index in sorted(found)]
    print(f"{summary(results)}\n\n{table(results)}")
    if json is not None:
        rows = [case.names | asdict(result) | {"expected": result.expected(case)} for case, result in results]
        json.write_text(dumps(rows, indent=2) + "\n")
    unexpected = sum(not result.expected(case) for case, result in results)
    say(f"{len(results)} programs, {unexpected} not as expected")
    return int(unexpected > 0)


if __name__ == "__main__":
    import tyro  # not at the top: the workers' environments don't have it

    sys.exit(tyro.cli(main))
