"""Checkpoints of a training state that survive kills and damage, and small portable weight files.

A checkpoint is a directory `step_N` that holds the arrays (written by orbax) and `record.json`:
the configuration, the name, type and shape of every leaf, and a CRC of every file. It is staged
beside the others and renamed when complete, so a kill at any point leaves the earlier ones as they
were. The CRCs are ours because orbax notices most damage but not all: a flipped byte inside an
array's data loads without complaint.

Leaves are stored under their path in the tree, flat, so that any registered pytree works and what
is restored takes its structure from `like`. One process writes; arrays may be sharded over its
devices and come back in the sharding of `like`.
"""

import json
import re
import shutil
import warnings
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from orbax.checkpoint import v1 as ocp

from seqmod import npz

_STEP = re.compile(r"step_(\d+)(\.replaced)?")
_CONFIG = "__config__"
_SCALARS = (bool, int, float, str)


class CheckpointError(Exception):
    """A checkpoint or parameter file that cannot be read."""


class CheckpointMismatch(CheckpointError):
    """A readable checkpoint of something else: another configuration, structure, shape or type."""


class _Damaged(Exception):
    """One checkpoint is incomplete or corrupted; an earlier one may be fine."""


def save(
    directory: str | Path,
    step: int,
    tree: Any,
    config: Mapping[str, Any] | None = None,
    *,
    keep: int = 2,
) -> Path:
    """Writes `tree` as the newest checkpoint under `directory` and returns its path.

    `tree` is any pytree of arrays, typed keys and Python numbers or strings; `config` anything that
    JSON can hold. Only the newest `keep` checkpoints stay. Steps beyond `step` belong to a future
    that was given up (a run resumed from an earlier checkpoint) and go as well.
    """
    if step < 0 or keep < 1:
        raise ValueError(f"save: step={step} and keep={keep}, expected step >= 0 and keep >= 1")
    directory = Path(directory).absolute()
    leaves = _named_leaves(tree)
    described = {name: _describe(name, leaf) for name, leaf in leaves.items()}
    arrays = {
        name: np.asarray(leaf) if isinstance(leaf, np.generic) else leaf
        for name, leaf in leaves.items()
        if not isinstance(leaf, _SCALARS) and leaf.size  # orbax refuses arrays without elements
    }
    staging = directory / "staging"
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    if arrays:
        ocp.save(str(staging / "arrays"), arrays)
    body = json.dumps(
        {
            "step": step,
            "config": config,
            "leaves": described,
            "scalars": {n: leaf for n, leaf in leaves.items() if isinstance(leaf, _SCALARS)},
            "files": {
                path.relative_to(staging).as_posix(): _crc(path)
                for path in sorted(staging.rglob("*"))
                if path.is_file()
            },
        }
    )
    (staging / "record.json").write_text(f"{body}\n{zlib.crc32(body.encode())}\n")

    target = directory / f"step_{step:09d}"
    if target.exists():
        aside = directory / f"{target.name}.replaced"
        shutil.rmtree(aside, ignore_errors=True)
        target.rename(aside)
    staging.rename(target)
    for old_step, path in list(_newest_first(directory)):
        if old_step > step or path.suffix:
            shutil.rmtree(path)
    for _, path in list(_newest_first(directory))[keep:]:
        shutil.rmtree(path)
    return target


def restore(directory: str | Path, like: Any, config: Mapping[str, Any] | None = None) -> tuple[int, Any]:
    """Reads the newest undamaged checkpoint under `directory`: `(step, tree)`.

    `like` gives the structure, shapes, types and shardings (arrays or `jax.ShapeDtypeStruct`s; the
    values of its Python numbers do not matter). A damaged checkpoint is passed over with a warning.
    Raises FileNotFoundError if there is none, CheckpointError if all are damaged, and
    CheckpointMismatch, naming what differs, if the newest one is of another tree or (where a
    `config` is given) of another configuration.
    """
    found = list(_newest_first(Path(directory).absolute()))
    if not found:
        raise FileNotFoundError(f"restore: there is no checkpoint in {directory}")
    for step, path in found:
        try:
            record = _read_record(path)
        except _Damaged as damage:
            warnings.warn(f"checkpoint {path} is damaged ({damage}), passed over", stacklevel=2)
            continue
        return step, _load(path, record, like, config)
    raise CheckpointError(
        f"restore: all {len(found)} checkpoints in {directory} are damaged: delete them to start again"
    )


def latest_step(directory: str | Path) -> int | None:
    """The step of the newest checkpoint under `directory`, damaged or not; None without any."""
    return next((step for step, _ in _newest_first(Path(directory))), None)


def differences(stored: Any, asked: Any, prefix: str = "") -> list[str]:
    """Where two JSON-like values differ, a line for each: `optimizer.lr: 0.1 stored, 0.2 asked`."""
    stored, asked = json.loads(json.dumps([stored, asked]))  # tuples are lists on disk
    if not (isinstance(stored, dict) and isinstance(asked, dict)):
        return [] if stored == asked else [f"{prefix}: {stored!r} stored, {asked!r} asked"]
    lines = []
    for name in sorted(stored.keys() | asked.keys()):
        path = f"{prefix}.{name}" if prefix else name
        if name not in asked:
            lines.append(f"{path}: {stored[name]!r} stored, not asked")
        elif name not in stored:
            lines.append(f"{path}: not stored, {asked[name]!r} asked")
        else:
            lines += differences(stored[name], asked[name], path)
    return lines


def export_params(path: str | Path, params: Mapping[str, Any], config: Mapping[str, Any]) -> None:
    """Writes nested dicts of arrays and a JSON-able `config` to one small compressed `.npz` file.

    The arrays are stored under '/'-joined names, so NumPy alone can read them. Equal arguments give
    equal bytes: a file in version control changes only when its contents do. Raises ValueError for
    what the format would not give back exactly: bfloat16, typed keys, lists, names with a '/'.
    """
    text = np.asarray(json.dumps(config, sort_keys=True))
    npz.write(path, {_CONFIG: text, **_flatten(params)})


def load_params(path: str | Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Reads what `export_params` wrote: `(params, config)`, the arrays as NumPy arrays.

    Raises FileNotFoundError, or CheckpointError for a file that is damaged or of another kind.
    """
    try:
        arrays = npz.read(path)
    except ValueError as error:
        raise CheckpointError(f"load_params: {error}") from error
    if _CONFIG not in arrays:
        raise CheckpointError(f"load_params: {path} was not written by export_params")
    config = json.loads(arrays.pop(_CONFIG).item())
    params: dict[str, Any] = {}
    for name, array in arrays.items():
        *groups, last = name.split("/")
        inner = params
        for group in groups:
            inner = inner.setdefault(group, {})
        inner[last] = array
    return params, config


def _flatten(params: Mapping[str, Any], prefix: str = "") -> dict[str, np.ndarray]:
    if not params:
        raise ValueError(f"export_params: {prefix or 'params'} is empty")
    flat: dict[str, np.ndarray] = {}
    for name, value in params.items():
        path = f"{prefix}{name}"
        if not isinstance(name, str) or not name or "/" in name or path == _CONFIG:
            raise ValueError(f"export_params: {path!r} is not a usable name: a string without '/'")
        if isinstance(value, Mapping):
            flat |= _flatten(value, f"{path}/")
        elif isinstance(value, jax.Array | np.ndarray | np.generic) and value.dtype.kind in "biufc":
            flat[path] = np.asarray(value)
        else:
            kind = getattr(value, "dtype", type(value).__name__)
            raise ValueError(
                f"export_params: {path} is {kind}, expected an array of floats (not bfloat16: "
                "convert it to float32, which is exact), integers or booleans"
            )
    return flat


def _newest_first(directory: Path) -> Iterator[tuple[int, Path]]:
    """Checkpoints by falling step; one that was moved aside comes after its replacement."""
    paths = directory.iterdir() if directory.is_dir() else ()
    found = [(int(m[1]), not m[2], path) for path in paths if (m := _STEP.fullmatch(path.name))]
    return ((step, path) for step, _, path in sorted(found, reverse=True))


def _named_leaves(tree: Any) -> dict[str, Any]:
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    named = {jax.tree_util.keystr(path, simple=True, separator="/") or "value": leaf for path, leaf in leaves}
    if len(named) != len(leaves):
        raise ValueError("checkpoint: two leaves of the tree have the same path; rename a key")
    return named


def _describe(name: str, leaf: Any) -> str:
    if isinstance(leaf, _SCALARS):
        return type(leaf).__name__
    if not (hasattr(leaf, "shape") and hasattr(leaf, "dtype")):
        raise TypeError(
            f"checkpoint: leaf {name} is a {type(leaf).__name__}, expected an array, a typed key, "
            "or a Python number or string"
        )
    return f"{leaf.dtype}[{','.join(map(str, leaf.shape))}]"


def _crc(path: Path) -> int:
    value = 0
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            value = zlib.crc32(block, value)
    return value


def _read_record(path: Path) -> dict[str, Any]:
    try:
        body, crc = (path / "record.json").read_bytes().splitlines()
        if zlib.crc32(body) != int(crc):
            raise _Damaged("record.json fails its checksum")
        record = json.loads(body)
        for name, expected in record["files"].items():
            if _crc(path / name) != expected:
                raise _Damaged(f"{name} fails its checksum")
    except (OSError, ValueError) as error:
        raise _Damaged(str(error)) from error
    return record


def _load(path: Path, record: dict[str, Any], like: Any, config: Mapping[str, Any] | None) -> Any:
    leaves = _named_leaves(like)
    asked = {name: _describe(name, leaf) for name, leaf in leaves.items()}
    wrong = [f"leaf {line}" for line in differences(record["leaves"], asked)]
    if config is not None:
        wrong += [f"config {line}" for line in differences(record["config"], dict(config))]
    if wrong:
        raise CheckpointMismatch(f"{path} holds something else:\n  " + "\n  ".join(wrong))

    values = dict(record["scalars"])
    arrays = {}
    for name, leaf in leaves.items():
        if isinstance(leaf, _SCALARS):
            continue
        if not leaf.size:
            values[name] = leaf if isinstance(leaf, np.ndarray) else jnp.zeros(leaf.shape, leaf.dtype)
        elif isinstance(leaf, np.ndarray | np.generic):
            arrays[name] = np.asarray(leaf)
        else:
            sharding = getattr(leaf, "sharding", None)
            if sharding is None:
                sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
            arrays[name] = jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
    if arrays:
        values |= ocp.load(str(path / "arrays"), arrays)
    return jax.tree.unflatten(jax.tree.structure(like), [values[name] for name in leaves])
