"""Reading published models: files, options, and tensors by name, with errors that say what does not fit."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file

from seqmod.mixers.base import Params
from seqmod.mixers.positions import RopeScaling

HEAD = "logits"
Options = Mapping[str, Any]
Arrays = Mapping[str, np.ndarray]


def read(path: str | Path, options: Options | None = None) -> tuple[Options, Arrays]:
    """Options and arrays of a folder with `config.json` and `model.safetensors`, or the shards that
    `model.safetensors.index.json` names, or of a file; a file needs `options`, for a folder they replace its config."""
    path = Path(path)
    if not path.is_dir():
        if options is None:
            raise ValueError(f"load: {path} is not a folder, expected one, or options for a file")
        return options, load_file(path)
    if options is None:
        config = path / "config.json"
        if not config.is_file():
            raise ValueError(f"load: {path} has no config.json, expected one, or options")
        options = dict(json.loads(config.read_text(encoding="utf-8")))
    whole, index = path / "model.safetensors", path / "model.safetensors.index.json"
    if whole.is_file():
        return options, load_file(whole)
    if not index.is_file():
        raise ValueError(f"load: {path} has neither {whole.name} nor {index.name}")
    names = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    arrays: dict[str, np.ndarray] = {}
    for shard in sorted(set(names.values())):
        if not (path / shard).is_file():
            raise ValueError(f"load: {path} has no {shard}, which {index.name} names")
        arrays |= load_file(path / shard)
    return options, arrays


def size(options: Options, name: str, default: int | None = None) -> int:
    """A positive integer among the options; one that is absent or null has the default, if there is any."""
    value = options.get(name)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"load: {name} is {value!r}, expected a positive integer")
    return value


def among[T](options: Options, name: str, default: Any, allowed: Mapping[Any, T]) -> T:
    """What an option's value means; raises ValueError for a value that means nothing here."""
    value = options.get(name, default)
    if value not in allowed:
        raise ValueError(f"load: {name} is {value!r}, expected one of {sorted(allowed, key=str)}")
    return allowed[value]


def flag(options: Options, name: str, default: bool) -> bool:
    """An option that is true or false."""
    return among(options, name, default, {True: True, False: False})


def refuse(options: Options, *names: str) -> None:
    """Raise ValueError where one of these options is set to anything."""
    for name in names:
        if options.get(name):
            raise ValueError(f"load: {name} is {options[name]!r}, which has no counterpart here")


class Rotation(NamedTuple):
    """Rotary embeddings: their `base`, the part of a head's channels that they turn, if it is given, and `scaling`."""

    base: float
    fraction: float | None
    scaling: RopeScaling | None


def rotation(options: Options) -> Rotation:
    """Rotary embeddings, which newer configs have among `rope_parameters`. Raises ValueError for other scalings than
    linear and llama3, and where kinds of blocks differ."""
    name = "rope_scaling" if options.get("rope_scaling") else "rope_parameters"
    given = options.get(name) or {}
    base = given.get("rope_theta", options.get("rope_theta", 10000.0))
    fraction = given.get("partial_rotary_factor", options.get("partial_rotary_factor"))
    kind = given.get("rope_type", given.get("type", "default"))
    if kind not in ("default", "linear", "llama3") or any(isinstance(value, Mapping) for value in given.values()):
        raise ValueError(
            f"load: {name} is {given!r}, expected one of rope_type 'default', 'linear' or 'llama3' for all blocks"
        )
    if kind == "default":
        return Rotation(base, fraction, None)
    needed = {"factor": "factor"}
    if kind == "llama3":
        needed |= {
            "context": "original_max_position_embeddings",
            "low": "low_freq_factor",
            "high": "high_freq_factor",
        }
    missing = [key for key in needed.values() if given.get(key) is None]
    if missing:
        raise ValueError(f"load: {name} is {given!r}, which lacks {', '.join(missing)}")
    return Rotation(base, fraction, RopeScaling(**{ours: given[key] for ours, key in needed.items()}))


class Tensors:
    """Arrays by their published names, each to be taken once; `finish` raises for what did not fit.

    Names start with `prefix`, except where a model without its head was saved: then none does. Arrays whose names end
    with one of `ignored` are constants that a model computes itself.
    """

    def __init__(self, arrays: Arrays, prefix: str, ignored: tuple[str, ...] = ()) -> None:
        self._prefix = "" if any(name.startswith(prefix) for name in arrays) else prefix
        self._left = {name: array for name, array in arrays.items() if not name.endswith(ignored)}
        self._problems: list[str] = []

    def find(self, name: str) -> np.ndarray | None:
        """An array as it is stored, or None; it stays to be taken."""
        return self._left.get(name.removeprefix(self._prefix))

    def take(self, name: str, *shape: int) -> np.ndarray:
        """An array of this shape in float32; zeros if there is none, which `finish` reports."""
        array = self.find(name)
        if array is None:
            self._problems.append(f"{name} is missing")
            return np.zeros(shape, np.float32)
        del self._left[name.removeprefix(self._prefix)]
        if not jnp.issubdtype(array.dtype, jnp.floating) or array.shape != shape:
            self._problems.append(f"{name} is {array.dtype}{list(array.shape)}, expected floats of shape {list(shape)}")
            return np.zeros(shape, np.float32)
        return np.asarray(array, np.float32)

    def matrix(self, name: str, inputs: int, outputs: int) -> np.ndarray:
        """The matrix (in, out) of a linear map, stored as (out, in)."""
        return self.take(f"{name}.weight", outputs, inputs).T

    def bias(self, name: str, outputs: int, present: bool) -> np.ndarray:
        """The bias of a linear map, zeros where the model has none."""
        return self.take(f"{name}.bias", outputs) if present else np.zeros(outputs, np.float32)

    def finish(self) -> None:
        """Raise ValueError for all arrays that were missing, misshapen or not taken."""
        problems = self._problems + [f"{name} is unexpected" for name in sorted(self._left)]
        if problems:
            raise ValueError("load: tensors do not fit the config: " + "; ".join(problems))


def heads(tensors: Tensors, tied: bool, embedding: str, tokens_VD: np.ndarray) -> Params:
    """Parameters of the one head, whose matrix is that of the embedding if it is tied; a copy may be stored then."""
    V, D = tokens_VD.shape
    head = {"bias": np.zeros(V, np.float32)}
    if not tied:
        return {HEAD: head | {"kernel": tensors.matrix("lm_head", D, V)}}
    stored = tensors.find("lm_head.weight")
    if stored is not None and not np.array_equal(tensors.take("lm_head.weight", V, D), tokens_VD):
        raise ValueError(f"load: tie_word_embeddings is True, but lm_head.weight is not equal to {embedding}")
    return {HEAD: head}


Family = Callable[[Options, Arrays], tuple[Any, Params]]
"""What a family's `convert` is: options and arrays to the config and parameters, as NumPy arrays, of a backbone."""
