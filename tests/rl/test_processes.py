"""Two processes, as on two hosts, train one model over the devices of both."""

import json
import os
import runpy
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

pytestmark = pytest.mark.usefixtures("quick_compile")

HERE = Path(__file__).parent
SCRIPT = HERE / "on_devices.py"
SECONDS = 600


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> list[dict]:
    """What each process found. If one fails or hangs, both are ended."""
    folder = tmp_path_factory.mktemp("processes")
    env = os.environ | {"JAX_NUM_CPU_DEVICES": "2", "NPROC": "32", "PYTHONPATH": str(HERE.parents[1])}
    address = f"127.0.0.1:{free_port()}"
    logs = [folder / f"{index}.log" for index in range(2)]
    processes = []
    try:
        for index, log in enumerate(logs):
            command = [sys.executable, SCRIPT, "process", folder / f"{index}.json", address, str(index)]
            with log.open("w") as file:
                processes.append(subprocess.Popen(command, env=env, stdout=file, stderr=file))
        deadline = time.monotonic() + SECONDS
        while any(process.poll() is None for process in processes) and time.monotonic() < deadline:
            if any(process.returncode for process in processes):
                break
            time.sleep(0.1)
    finally:
        for process in processes:
            process.kill()
            process.wait()
    said = "\n".join(log.read_text()[-3000:] for log in logs)
    codes = [process.returncode for process in processes]
    assert codes == [0, 0], f"exit codes {codes} (-9: ended after {SECONDS} seconds, or as the other failed)\n{said}"
    return [json.loads((folder / f"{index}.json").read_text()) for index in range(2)]


@pytest.mark.slow
def test_both_processes_have_half_of_the_environments(found):
    for facts in found:
        assert (facts["devices"], facts["here"], facts["rows here"]) == (4, 2, 8)


@pytest.mark.slow
def test_both_end_with_the_parameters_of_one_process(found):
    assert found[0]["params"] == found[1]["params"]
    assert found[0]["loss"] == found[1]["loss"]
    script = runpy.run_path(str(SCRIPT))
    alone = script["alone"](script["build"]("mlp"), 3)
    # The tolerance is that of test_devices.
    np.testing.assert_allclose(found[0]["params"], script["numbers"](alone.params), rtol=0, atol=1e-3)
