"""The directory of one run: what was asked, what was measured, and how far it has come.

    config.json     the configuration, the versions, the device
    metrics.jsonl   one JSON object a line: stage, step, time (Unix seconds), metrics
    result.json     the claim, what was measured, whether it holds
    figures/        images and animations
    stages/NAME/    checkpoints and metrics of a stage, and once finished done.json and arrays.npz

Every file is written whole or not at all, so a run can be killed at any point and resumed.
"""

import importlib.metadata
import json
import math
import os
import platform
import re
import shlex
import sys
import time
import warnings
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from seqmod import npz
from seqmod.checkpoint import differences

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "gymnax", "brax")
_RESULT_FIELDS = ("claim", "measured", "holds", "seeds", "spread")


class RunError(Exception):
    """A run that cannot start or go on; the message says what would be right."""


@dataclass(frozen=True)
class RunDirectory:
    """An open run; make one with `RunDirectory.open`."""

    path: Path
    config: dict[str, Any]

    @classmethod
    def open(
        cls,
        path: str | Path,
        config: Mapping[str, Any],
        resume: bool,
        *,
        free: Collection[str] = (),
    ) -> "RunDirectory":
        """Creates the directory of a run, or with `resume` goes on in one that exists.

        `config` is anything that JSON can hold. A resumed run must ask for the configuration it was
        started with, except in the fields named by `free` ("eval.every" is inside "eval"). With
        `resume`, an empty or missing directory is a new run: the first attempt may have been killed
        before it wrote anything. Raises RunError if the directory is of no use.
        """
        path = Path(path).absolute()
        asked: dict[str, Any] = json.loads(json.dumps(config))
        surroundings = _surroundings(asked)
        try:
            path.mkdir(parents=True, exist_ok=True)
            content = {item.name for item in path.iterdir() if not item.name.endswith(".partial")}
            if not content:
                _write_json(path / "config.json", {"config": asked} | surroundings)
                return cls(path, asked)
            (path / "write_test.partial").touch()
            (path / "write_test.partial").unlink()
        except OSError as error:
            raise RunError(
                f"cannot write to {path} ({error.strerror}): name a directory that can be made or written to"
            ) from error
        if not resume:
            raise RunError(f"{path} is not empty: resume the run that is in it, or name a new directory")
        if "config.json" not in content:
            raise RunError(
                f"{path} holds something else than a run (it has no config.json): name the "
                "directory of the run to resume, or a new one"
            )
        stored = json.loads((path / "config.json").read_text())
        wrong = [
            line
            for line in differences(stored["config"], asked)
            if not any(re.match(rf"{re.escape(name)}[.:]", line) for name in free)
        ]
        if wrong:
            raise RunError(
                f"{path} was started with another configuration:\n  "
                + "\n  ".join(wrong)
                + "\nresume with the stored values, or name a new directory"
            )
        changed = [line for part in ("versions", "device") for line in differences(stored[part], surroundings[part])]
        if changed:
            warnings.warn(
                f"{path} is resumed on other ground, so numbers may differ: {'; '.join(changed)}",
                stacklevel=2,
            )
        return cls(path, asked)

    def log(self, stage: str, step: int, metrics: Mapping[str, Any]) -> None:
        """Appends one line to metrics.jsonl; NaN and infinity are written as null."""
        entry = {"stage": stage, "step": step, "time": round(time.time(), 3), "metrics": metrics}
        with (self.path / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(_jsonable(entry)) + "\n")

    def truncate_log(self, stage: str, step: int) -> None:
        """Drops what `stage` logged beyond `step`, and a last line that a kill cut off."""
        path = self.path / "metrics.jsonl"
        if not path.exists():
            return
        lines = path.read_text().splitlines(keepends=True)
        kept = []
        for line in lines:
            if line.endswith("\n"):
                entry = json.loads(line)
                if entry["stage"] != stage or entry["step"] <= step:
                    kept.append(line)
        if kept != lines:
            _write_text(path, "".join(kept))

    def write_result(self, result: Mapping[str, Any]) -> None:
        """Writes result.json; it must have claim, measured, holds, seeds and spread."""
        absent = [name for name in _RESULT_FIELDS if name not in result]
        if absent:
            raise RunError(f"write_result: the result lacks {', '.join(absent)}")
        _write_json(self.path / "result.json", result)

    def figure(self, name: str) -> Path:
        """Where to write the figure `name` (with its extension)."""
        folder = self.path / "figures"
        folder.mkdir(exist_ok=True)
        return folder / name

    def stage_directory(self, stage: str) -> Path:
        """The folder of a stage, made if need be."""
        if not re.fullmatch(r"[\w.-]*\w", stage):
            raise RunError(f"stage {stage!r}: use letters, digits, '_', '-' and '.'")
        folder = self.path / "stages" / stage
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def stage_done(
        self,
        stage: str,
        results: Mapping[str, Any] | None = None,
        arrays: Mapping[str, Any] | None = None,
    ) -> None:
        """Marks a stage as finished and keeps its small results (JSON) and its arrays."""
        folder = self.stage_directory(stage)
        kept = {name: host_array(array) for name, array in (arrays or {}).items()}
        npz.write(folder / "arrays.npz", kept)
        _write_json(folder / "done.json", results or {})  # last: its presence is the mark

    def is_done(self, stage: str) -> bool:
        """Whether `stage_done` was called for this stage, in this process or an earlier one."""
        return (self.path / "stages" / stage / "done.json").exists()

    def stage_results(self, stage: str) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """What `stage_done` kept: `(results, arrays)`. Raises RunError if it is not done."""
        if not self.is_done(stage):
            raise RunError(f"stage {stage} of {self.path} is not done: run it first")
        folder = self.stage_directory(stage)
        return json.loads((folder / "done.json").read_text()), npz.read(folder / "arrays.npz")


def host_array(array: Any) -> np.ndarray:
    """The array in NumPy; bfloat16, which NumPy alone does not know, becomes float32."""
    array = np.asarray(array)
    return array.astype(np.float32) if array.dtype.kind == "V" else array


def resume_command(path: Path) -> str:
    """What to type to go on with the run in `path`: this process's command with `--resume`."""
    spec = sys.modules["__main__"].__spec__
    if spec is None:  # a notebook or a script of the user's own
        return f"open the run again with resume=True: {path}"
    arguments = sys.argv[1:]
    if not any(word == "--out" or word.startswith("--out=") for word in arguments):
        arguments = [*arguments, "--out", str(path)]
    if "--resume" not in arguments:
        arguments = [*arguments, "--resume"]
    return f"python -m {spec.name.removesuffix('.__main__')} {shlex.join(arguments)}"


def _surroundings(config: Mapping[str, Any]) -> dict[str, Any]:
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "absent"
    device = jax.devices()[0]
    return {
        "versions": versions,
        "device": {
            "platform": device.platform,
            "kind": device.device_kind,
            "count": jax.device_count(),
        },
        "seed": config.get("seed"),
    }


def _jsonable(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(name): _jsonable(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_jsonable(item) for item in value]
    if isinstance(value, jax.Array | np.ndarray | np.generic):
        return _jsonable(host_array(value).tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _write_text(path: Path, text: str) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text)
    os.replace(partial, path)


def _write_json(path: Path, value: Any) -> None:
    _write_text(path, json.dumps(_jsonable(value), indent=2) + "\n")
