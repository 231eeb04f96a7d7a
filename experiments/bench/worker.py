"""One process that prepares and times contenders on request, so that peers run beside each other by the same code.

Requests and answers are lines of JSON. `Local` answers in this process, `Process` asks another interpreter, which may
have another environment, and ends it if it does not answer in time.

Command, as started by `experiments.bench.kernels`: python -m experiments.bench.worker
"""

import importlib
import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from experiments.bench import cases

ROOT = Path(__file__).resolve().parents[2]
# For glibc: keep and reuse freed memory. Otherwise each call gets its large buffers as fresh pages, and their faults
# would be most of what is timed.
MEMORY = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(2**34),
    "MALLOC_TOP_PAD_": str(2**28),
    # Threads' arenas end at 64 MiB: larger buffers are fresh pages in any case, but large ones, so that few are.
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
}
Request = dict[str, Any]


class Refusal(Exception):
    """A contender that can't be timed here, with the reason."""


class Worker(Protocol):
    """What answers requests."""

    def ask(self, request: Request) -> Request:
        """The answer; {"refused": reason} where there is none."""
        ...

    def close(self) -> None:
        """End it."""
        ...


class Local:
    """Holds prepared calls by key, of one contender family: ours if `peer` is empty."""

    def __init__(self, peer: str = "") -> None:
        self.peer = peer
        self.calls: dict[str, tuple[Callable[[], Any], Callable[[Any], None]]] = {}

    def ask(self, request: Request) -> Request:
        """Answer "prepare", "time" or "drop"."""
        answers = {"prepare": self._prepare, "time": self._time, "drop": self._drop}
        try:
            return answers[request["do"]](**request["with"])
        except (Refusal, NotImplementedError) as reason:
            return {"refused": str(reason)}
        except Exception as error:
            lines = str(error).strip().splitlines() or [""]
            return {"refused": f"{type(error).__name__}: {lines[0][:120]}"}

    def close(self) -> None:
        """Forget everything."""
        self.calls.clear()

    def _drop(self) -> Request:
        self.calls.clear()
        return {}

    def _prepare(
        self,
        key: str,
        name: str,
        case: str,
        length: int,
        sizes: str,
        backward: bool,
        narrow: bool,
        platform: str,
        most_bytes: float,
        compare: str,
        keep: str,
        tolerance: float,
    ) -> Request:
        """Compile a contender, run it once, and compare its results with those in the file `compare`, if one is named.

        `keep` is a file for the results. `narrow` inputs are bfloat16.
        """
        arrays = cases.draw(case, length, cases.SIZES[sizes])
        if name == "softmax attention":
            arrays = {each: arrays[each] for each in ("q", "k", "v", "cotangent")}
        if self.peer:
            peer = importlib.import_module("experiments.bench.peers").PEERS[self.peer]
            function, torch = peer.find(case, platform), peer.torch
        else:
            function, torch = importlib.import_module("experiments.bench.contenders").find(case, name), False
        make = _torch_call if torch else _jax_call
        call, wait, temporary = make(function, arrays, backward, narrow, most_bytes)
        begun = time.perf_counter()
        results = call()
        wait(results)
        seconds = time.perf_counter() - begun
        flat = _flatten(results, torch)
        error = None
        if compare:
            with np.load(compare) as wanted:
                error = float(np.max([_distance(flat[each], wanted[each]) for each in wanted.files]))
            if not error <= tolerance:
                raise Refusal(f"wrong: differs from the definition by {error:.1e}")
        if keep:
            np.savez(keep, allow_pickle=False, **flat)
        self.calls[key] = call, wait
        return {"temporary": temporary, "error": error, "seconds": seconds}

    def _time(self, key: str, calls: int) -> Request:
        """Seconds a call on the clock, and of all threads of this process."""
        call, wait = self.calls[key]
        begun, begun_work = time.perf_counter(), time.process_time()
        results = call()
        for _ in range(calls - 1):
            results = call()
        wait(results)
        return {
            "seconds": (time.perf_counter() - begun) / calls,
            "work": (time.process_time() - begun_work) / calls,
        }


def _distance(found: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.linalg.norm((found - wanted).ravel()) / (np.linalg.norm(wanted.ravel()) + 1e-30))


def _jax_call(function, arrays, backward: bool, narrow: bool, most_bytes: float):
    jax, jnp = importlib.import_module("jax"), importlib.import_module("jax.numpy")

    def place(name, array):
        return jnp.asarray(array, jnp.bfloat16 if narrow and name not in cases.WIDE else array.dtype)

    placed = {name: place(name, array) for name, array in arrays.items()}
    cotangent = placed.pop("cotangent")

    def run(cotangent, inputs):
        if not backward:
            return function(**inputs), {}
        output, pull = jax.vjp(lambda inputs: function(**inputs), inputs)
        return output, pull(cotangent.astype(output.dtype))[0]

    program = jax.jit(run).lower(cotangent, placed).compile()
    memory = program.memory_analysis()
    temporary = None if memory is None else memory.temp_size_in_bytes
    if temporary is not None and temporary > most_bytes:
        raise Refusal(f"needs {temporary / 2**30:.1f} GiB")
    return lambda: program(cotangent, placed), jax.block_until_ready, temporary


def _torch_call(function, arrays, backward: bool, narrow: bool, most_bytes: float):
    torch = importlib.import_module("torch")

    def place(name, array):
        dtype = torch.bfloat16 if narrow and name not in cases.WIDE else torch.float32
        return torch.tensor(array, device="cuda", dtype=dtype, requires_grad=backward and name != "cotangent")

    placed = {name: place(name, array) for name, array in arrays.items()}
    cotangent = placed.pop("cotangent")

    def run():
        if not backward:
            with torch.no_grad():
                return function(**placed), {}
        output = function(**placed)
        gradients = torch.autograd.grad(output, list(placed.values()), cotangent.to(output.dtype))
        return output, dict(zip(placed, gradients, strict=True))

    del most_bytes
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return run, lambda _: torch.cuda.synchronize(), torch.cuda.max_memory_allocated() - before


def _flatten(results, torch: bool) -> dict[str, np.ndarray]:
    """The output as `y` and each gradient as `d_` and its name, in float32 or complex64."""
    output, gradients = results
    flat = {"y": output} | {f"d_{name}": gradient for name, gradient in gradients.items()}
    if torch:
        return {name: array.detach().float().cpu().numpy() for name, array in flat.items()}
    dtypes = {name: np.complex64 if array.dtype.kind == "c" else np.float32 for name, array in flat.items()}
    return {name: np.asarray(array).astype(dtypes[name]) for name, array in flat.items()}


class Process:
    """A worker in another interpreter. It is started on the first request, and anew after it has died.

    `module` serves, by this module's requests or its own; `prefix` are words before the command, such as chrt's.
    """

    def __init__(
        self,
        python: Path,
        peer: str,
        log: Path,
        patience: float,
        module: str = "experiments.bench.worker",
        prefix: Sequence[str] = (),
    ) -> None:
        self.python, self.peer, self.log, self.patience = python, peer, log, patience
        self.module, self.prefix = module, prefix
        self.running: subprocess.Popen | None = None

    def ask(self, request: Request) -> Request:
        """The answer, or a refusal if the process dies or is silent for longer than `patience` seconds."""
        if self.running is None:
            with self.log.open("ab") as log:
                self.running = subprocess.Popen(
                    [*self.prefix, str(self.python), "-m", self.module, self.peer],
                    cwd=ROOT,
                    env=os.environ | MEMORY,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=log,
                )
        stdin, stdout = self.running.stdin, self.running.stdout
        assert stdin is not None
        assert stdout is not None
        try:
            stdin.write(json.dumps(request).encode() + b"\n")
            stdin.flush()
            ready, _, _ = select.select([stdout], [], [], self.patience)
            line = stdout.readline() if ready else b""
        except BrokenPipeError:
            ready, line = [stdout], b""
        if line:
            return json.loads(line)
        self.close()
        return {"refused": "its process died" if ready else f"no answer in {self.patience:.0f} s"}

    def close(self) -> None:
        """End the process."""
        if self.running is not None:
            self.running.kill()
            self.running.communicate()
            self.running = None


def serve(peer: str) -> None:
    """Answer requests from standard input until it ends. What others print goes to standard error."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    worker = Local(peer)
    for line in sys.stdin:
        print(json.dumps(worker.ask(json.loads(line))), file=answers)


if __name__ == "__main__":
    serve(*sys.argv[1:])
