"""Checkpoints and parameter files: exact round trips, damage, mismatches, what a kill leaves."""

import json
import shutil
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from seqmod import checkpoint

CONFIG = {"model": {"width": 5, "layers": [2, 3]}, "lr": 0.1}


class State(NamedTuple):
    params: dict
    optimizer: optax.OptState
    key: jax.Array
    step: int
    extra: tuple


def make_state(seed: int = 0, width: int = 5) -> State:
    k_w, k_state = jax.random.split(jax.random.key(seed))
    params = {
        "dense": {"w": jax.random.normal(k_w, (3, width)), "b": jnp.ones(width, jnp.bfloat16)},
        "empty": jnp.zeros((0, 7)),
    }
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
    extra = (np.arange(11), np.float64(0.1), True, "name", None, {}, jnp.uint8(255))
    return State(params, optimizer.init(params), jax.random.split(k_state, 2), seed, extra)


def bits(leaf):
    if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    return leaf if isinstance(leaf, bool | int | str) else np.asarray(leaf)


def assert_same(a, b) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert type(bits(x)) is type(bits(y))
        assert getattr(x, "dtype", None) == getattr(y, "dtype", None)
        np.testing.assert_array_equal(bits(x), bits(y))


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0xFF
    path.write_bytes(data)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def test_a_state_comes_back_exactly(tmp_path):
    state = make_state(3)
    checkpoint.save(tmp_path, 17, state, CONFIG)
    step, restored = checkpoint.restore(tmp_path, make_state(4), CONFIG)
    assert step == 17
    assert_same(restored, state)
    # The key goes on with the same numbers.
    draws = [jax.random.normal(s.key[0], (3,)) for s in (state, restored)]
    np.testing.assert_array_equal(*draws)


def test_shapes_alone_are_enough_to_restore(tmp_path):
    state = {"w": jnp.arange(6.0).reshape(2, 3), "key": jax.random.key(1)}
    checkpoint.save(tmp_path, 0, state)
    _, restored = checkpoint.restore(tmp_path, jax.eval_shape(lambda: state))
    assert_same(restored, state)


def test_a_tree_without_arrays_and_a_bare_array(tmp_path):
    checkpoint.save(tmp_path / "a", 1, {"n": 3, "rate": 0.1})
    assert checkpoint.restore(tmp_path / "a", {"n": 0, "rate": 0.0}) == (1, {"n": 3, "rate": 0.1})
    checkpoint.save(tmp_path / "b", 1, jnp.arange(3))
    _, array = checkpoint.restore(tmp_path / "b", jnp.zeros(3, jnp.int32))
    np.testing.assert_array_equal(array, [0, 1, 2])


def test_the_last_ones_are_kept_and_the_newest_is_restored(tmp_path):
    for step in (2, 3, 10, 11):
        checkpoint.save(tmp_path, step, {"x": jnp.float32(step)}, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_000000010", "step_000000011"]
    assert checkpoint.latest_step(tmp_path) == 11
    step, tree = checkpoint.restore(tmp_path, {"x": jnp.float32(0)})
    assert (step, float(tree["x"])) == (11, 11.0)


def test_saving_an_earlier_step_gives_up_the_later_ones(tmp_path):
    for step in (4, 6, 5):
        checkpoint.save(tmp_path, step, {"x": jnp.float32(step)}, keep=2)
    assert checkpoint.restore(tmp_path, {"x": jnp.float32(0)})[0] == 5


def test_a_step_can_be_saved_again(tmp_path):
    for value in (1.0, 2.0):
        checkpoint.save(tmp_path, 5, {"x": jnp.float32(value)}, keep=1)
    step, tree = checkpoint.restore(tmp_path, {"x": jnp.float32(0)})
    assert (step, float(tree["x"])) == (5, 2.0)
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("point", ["staged", "moved_aside", "replaced", "half_deleted"])
def test_what_a_kill_leaves_is_usable(tmp_path, point):
    checkpoint.save(tmp_path, 4, {"x": jnp.float32(4)})
    newest = checkpoint.save(tmp_path, 5, {"x": jnp.float32(5)})
    aside = newest.with_name(newest.name + ".replaced")
    if point == "staged":
        shutil.copytree(newest, tmp_path / "staging")
        (tmp_path / "staging" / "record.json").unlink()
    elif point == "moved_aside":
        newest.rename(aside)
    elif point == "replaced":
        shutil.copytree(newest, aside)
    else:
        (tmp_path / "step_000000004" / "record.json").unlink()
    step, tree = checkpoint.restore(tmp_path, {"x": jnp.float32(0)})
    assert (step, float(tree["x"])) == (5, 5.0)
    for again in (5, 6):
        checkpoint.save(tmp_path, again, {"x": jnp.float32(7)})
        step, tree = checkpoint.restore(tmp_path, {"x": jnp.float32(0)})
        assert (step, float(tree["x"])) == (again, 7.0)
    assert all(path.name.startswith("step_") and not path.suffix for path in tmp_path.iterdir())


@pytest.mark.parametrize("harm", [truncate, flip, Path.unlink])
def test_damage_to_any_file_falls_back_with_a_warning(tmp_path, harm):
    checkpoint.save(tmp_path / "good", 1, make_state(1), CONFIG)
    newest = checkpoint.save(tmp_path / "good", 2, make_state(2), CONFIG)
    files = [path.relative_to(newest) for path in newest.rglob("*") if path.is_file()]
    assert len(files) > 5
    for name in files:
        copy = tmp_path / "copy"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(tmp_path / "good", copy)
        victim = copy / newest.name / name
        if victim.stat().st_size == 0 and harm is not Path.unlink:
            continue
        harm(victim)
        with pytest.warns(UserWarning, match=f"{newest.name} is damaged"):
            step, state = checkpoint.restore(copy, make_state(0), CONFIG)
        assert step == 1
        assert_same(state, make_state(1))


def test_nothing_to_restore_and_nothing_readable(tmp_path):
    with pytest.raises(FileNotFoundError, match="no checkpoint in"):
        checkpoint.restore(tmp_path / "absent", {"x": 0})
    path = checkpoint.save(tmp_path, 1, {"x": jnp.float32(0)})
    truncate(path / "record.json")
    with (
        pytest.warns(UserWarning, match="damaged"),
        pytest.raises(checkpoint.CheckpointError, match="all 1 checkpoints"),
    ):
        checkpoint.restore(tmp_path, {"x": jnp.float32(0)})


def test_another_configuration_is_named(tmp_path):
    checkpoint.save(tmp_path, 1, {"x": jnp.float32(0)}, CONFIG)
    asked = {"model": {"width": 7, "layers": (2, 3)}, "lr": 0.1, "seed": 3}
    with pytest.raises(checkpoint.CheckpointMismatch) as error:
        checkpoint.restore(tmp_path, {"x": jnp.float32(0)}, asked)
    assert "model.width: 5 stored, 7 asked" in str(error.value)
    assert "seed: not stored, 3 asked" in str(error.value)
    assert "layers" not in str(error.value)
    assert "lr" not in str(error.value)


def test_another_tree_is_named(tmp_path):
    checkpoint.save(tmp_path, 1, {"a": jnp.zeros((2, 3)), "b": jnp.zeros(5), "c": 1})
    like = {"a": jnp.zeros((2, 7)), "c": jnp.int32(1), "d": jnp.zeros(5)}
    with pytest.raises(checkpoint.CheckpointMismatch) as error:
        checkpoint.restore(tmp_path, like)
    for line in (
        "leaf a: 'float32[2,3]' stored, 'float32[2,7]' asked",
        "leaf b: 'float32[5]' stored, not asked",
        "leaf c: 'int' stored, 'int32[]' asked",
        "leaf d: not stored, 'float32[5]' asked",
    ):
        assert line in str(error.value)


def test_a_leaf_that_is_no_array_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(TypeError, match="leaf a/f is a function"):
        checkpoint.save(tmp_path / "new", 1, {"a": {"f": bits}})
    assert not (tmp_path / "new").exists()


def test_sharded_arrays_come_back_in_the_sharding_asked_for(tmp_path):
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    checkpoint.save(tmp_path, 1, {"x": jnp.arange(6.0)})
    like = {"x": jax.ShapeDtypeStruct((6,), jnp.float32, sharding=rows)}
    _, tree = checkpoint.restore(tmp_path, like)
    assert tree["x"].sharding == rows


PARAMS = {
    "block_0": {"w": np.linspace(0, 1, 15, dtype=np.float32).reshape(3, 5), "n": np.int32(7)},
    "block_1": {"half": np.arange(7, dtype=np.float16) / 3, "ids": np.arange(11)},
}


def test_params_file_round_trip_is_exact(tmp_path):
    path = tmp_path / "model.npz"
    params = {**PARAMS, "jax": jnp.linspace(-1, 1, 7)}
    checkpoint.export_params(path, params, CONFIG)
    loaded, config = checkpoint.load_params(path)
    assert config == CONFIG
    assert_same(loaded, jax.tree.map(np.asarray, params))
    with np.load(path) as archive:  # readable without this package
        np.testing.assert_array_equal(archive["block_0/w"], PARAMS["block_0"]["w"])
    assert [p.name for p in tmp_path.iterdir()] == ["model.npz"]


def test_equal_params_give_equal_files(tmp_path):
    checkpoint.export_params(tmp_path / "a.npz", PARAMS, CONFIG)
    params = dict(reversed(PARAMS.items()))
    checkpoint.export_params(tmp_path / "b.npz", params, dict(reversed(CONFIG.items())))
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"a": {"w": jnp.ones(3, jnp.bfloat16)}}, "a/w is bfloat16"),
        ({"k": jax.eval_shape(lambda: jax.random.key(0))}, "k is key<fry>"),
        ({"a": [np.ones(3)]}, "a is list"),
        ({"a/b": np.ones(3)}, "'a/b' is not a usable name"),
        ({"a": {}}, "a/ is empty"),
    ],
)
def test_params_that_would_not_come_back_are_refused(tmp_path, params, message):
    with pytest.raises(ValueError, match=message):
        checkpoint.export_params(tmp_path / "x.npz", params, {})
    assert not list(tmp_path.iterdir())


def test_a_bad_params_file_says_so(tmp_path):
    path = tmp_path / "x.npz"
    with pytest.raises(FileNotFoundError):
        checkpoint.load_params(path)
    for harm in (truncate, flip):
        checkpoint.export_params(path, PARAMS, CONFIG)
        harm(path)
        with pytest.raises(checkpoint.CheckpointError, match=r"x\.npz is damaged"):
            checkpoint.load_params(path)
    np.savez(path, w=np.ones(3))
    with pytest.raises(checkpoint.CheckpointError, match="not written by export_params"):
        checkpoint.load_params(path)
    path.write_text(json.dumps({}))
    with pytest.raises(checkpoint.CheckpointError):
        checkpoint.load_params(path)
