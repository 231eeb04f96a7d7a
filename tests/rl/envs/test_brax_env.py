"""Brax through gymnax's interface: against Brax's own environments, MuJoCo's own engine, and loops by hand."""

import os
import subprocess
import sys
import warnings
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import mujoco
import numpy as np
import pytest

from rl.envs.brax_env import BraxEnv, BraxParams, brax_allowed, brax_environments

pytestmark = pytest.mark.usefixtures("quick_compile")

BACKENDS = ("spring", "positional", "generalized", "mjx")
E, T = 5, 13


@pytest.fixture(scope="module")
def pendulum():
    return BraxEnv("inverted_pendulum", "spring", episode_length=7)


def actions(env, *axes, low=-1.0, high=1.0):
    return jax.random.uniform(jax.random.key(3), (*axes, env.num_actions), minval=low, maxval=high)


def start(env, params, count=E, seed=0):
    return jax.jit(jax.vmap(env.reset_env, (0, None)))(jax.random.split(jax.random.key(seed), count), params)


def stepper(env, params_axis=None):
    """One compiled step of E environments."""
    return jax.jit(jax.vmap(partial(env.step_env, jax.random.key(0)), (0, 0, params_axis)))


def types(tree):
    return [(x.shape, x.dtype, x.weak_type) for x in jax.tree.leaves(tree)]


@pytest.mark.parametrize(
    ("name", "backend"),
    [
        ("inverted_pendulum", "spring"),
        pytest.param("inverted_pendulum", "mjx", marks=pytest.mark.slow),
        ("reacher", "spring"),
        pytest.param("ant", "spring", marks=pytest.mark.slow),
    ],
)
def test_every_step_is_braxs_own(name, backend):
    env = BraxEnv(name, backend)
    params = env.default_params
    action_TEA = actions(env, T, E)
    with brax_allowed():
        from brax import envs

        own = envs.get_environment(name, backend=backend)
        wanted = jax.jit(jax.vmap(own.reset))(jax.random.split(jax.random.key(0), E))
        own_step = jax.jit(jax.vmap(own.step))
    obs_EF, state = start(env, params)
    np.testing.assert_array_equal(obs_EF, wanted.obs)
    step = stepper(env)
    for t in range(T):
        obs_EF, state, reward_E, terminated_E, info = step(state, action_TEA[t], params)
        with brax_allowed():
            wanted = own_step(wanted, action_TEA[t])
        close = partial(np.testing.assert_allclose, rtol=1e-5, atol=2e-5)
        close(obs_EF, wanted.obs)
        close(reward_E, wanted.reward)
        jax.tree.map(close, state.brax.pipeline_state.q, wanted.pipeline_state.q)
        np.testing.assert_array_equal(terminated_E, wanted.done == 1)
        np.testing.assert_array_equal(info["discount"], 1 - wanted.done)
        np.testing.assert_array_equal(state.time, t + 1)
        assert set(info) == {f"metrics/{metric}" for metric in wanted.metrics} | {"discount"}
        for metric, value in wanted.metrics.items():
            close(info[f"metrics/{metric}"], value)
        # Small differences grow in unstable motion, so every step is compared from the same state.
        state = state.replace(brax=jax.tree.map(lambda new, old: jnp.asarray(new, old.dtype), wanted, state.brax))
    assert reward_E.dtype == obs_EF.dtype == np.float32
    assert terminated_E.dtype == bool


def test_the_time_limit_is_no_termination(pendulum):
    params = BraxParams(max_steps_in_episode=jnp.array([7, 3, 11]))
    axes = BraxParams(max_steps_in_episode=0)
    _, state = start(pendulum, pendulum.default_params, 3)
    step, limit = stepper(pendulum, axes), jax.vmap(pendulum.is_truncated, (0, axes))
    terminated_T3, truncated_T3 = [], []
    # Pushed one way the pole falls; a small push takes longer.
    push_3A = jnp.array([[0.05], [0.05], [1.0]])
    for _ in range(T):
        _, state, _, terminated_3, _ = step(state, push_3A, params)
        terminated_T3.append(terminated_3)
        truncated_T3.append(limit(state, params))
    t, limits = np.arange(1, T + 1)[:, None], np.array([[7, 3, 11]])
    np.testing.assert_array_equal(np.array(truncated_T3), t >= limits)
    fell = np.abs(np.array(state.brax.pipeline_state.q)[:, 1]) > 0.2
    np.testing.assert_array_equal(np.array(terminated_T3)[-1], fell)
    assert fell[2]
    assert not np.array(terminated_T3)[:3].any()


def test_the_default_limit_is_the_episode_length(pendulum):
    assert pendulum.default_params.max_steps_in_episode == 7
    assert BraxEnv("inverted_pendulum").default_params.max_steps_in_episode == 1000


def test_fresh_keys_give_fresh_starts_and_any_kind_of_key_serves(pendulum):
    params = pendulum.default_params
    obs_EF, _ = start(pendulum, params)
    again_EF, _ = start(pendulum, params)
    np.testing.assert_array_equal(obs_EF, again_EF)
    assert len(np.unique(obs_EF[:, 1])) == E
    assert np.abs(obs_EF[:, :2]).max() <= 0.01
    raw = jax.random.key_data(jax.random.split(jax.random.key(0), E))
    np.testing.assert_array_equal(jax.jit(jax.vmap(pendulum.reset_env, (0, None)))(raw, params)[0], obs_EF)


def test_a_repeated_action_sums_rewards_and_stops_at_termination(pendulum):
    repeat = 3
    env = BraxEnv("inverted_pendulum", "spring", action_repeat=repeat)
    params = env.default_params
    _, state = start(env, params)
    step, single = stepper(env), stepper(pendulum)
    action_EA = jnp.linspace(-1.0, 0.7, E)[:, None]
    lengths = set()
    for _ in range(6):
        obs_EF, after, reward_E, terminated_E, _ = step(state, action_EA, params)
        wanted, total_E, running_E, taken_E = state, np.zeros(E), np.ones(E, bool), np.zeros(E, int)
        for _ in range(repeat):
            _, moved, once_E, ended_E, _ = single(wanted, action_EA, params)
            wanted = jax.tree.map(
                lambda new, old, keep=running_E: np.where(keep.reshape(-1, *(1,) * (new.ndim - 1)), new, old),
                moved,
                wanted,
            )
            total_E, taken_E = total_E + running_E * np.asarray(once_E), taken_E + running_E
            running_E = running_E & ~np.asarray(ended_E)
        np.testing.assert_array_equal(reward_E, total_E)
        np.testing.assert_array_equal(terminated_E, ~running_E)
        np.testing.assert_array_equal(after.time, state.time + taken_E)
        np.testing.assert_allclose(obs_EF, wanted.brax.obs, atol=1e-5)
        lengths |= set(taken_E[~running_E].tolist())
        _, fresh = start(env, params, seed=1)
        state = jax.tree.map(
            lambda new, old, end=terminated_E: jnp.where(end.reshape(-1, *(1,) * (new.ndim - 1)), new, old),
            fresh,
            after,
        )
    assert len(lengths) > 1


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("name", "action_repeat"),
    [
        ("inverted_pendulum", 1),
        ("inverted_pendulum", 2),
        *(pytest.param(name, 1, marks=pytest.mark.slow) for name in brax_environments() if name != "inverted_pendulum"),
    ],
)
def test_a_state_is_the_carry_of_a_scan(name, backend, action_repeat):
    env = BraxEnv(name, backend, action_repeat=action_repeat)
    params = env.default_params
    obs_F, state = jax.eval_shape(env.reset_env, jax.random.key(0), params)
    action_A = jax.eval_shape(env.action_space(params).sample, jax.random.key(0))
    after = jax.eval_shape(partial(env.step_env, params=params), jax.random.key(0), state, action_A)
    assert jax.tree.structure(after[1]) == jax.tree.structure(state)
    assert types(after[1]) == types(state)
    assert types(after[0]) == types(obs_F) == [(env.observation_space(params).shape, jnp.float32, False)]
    assert types(after[2]) == [((), jnp.float32, False)]
    assert types(after[3]) == [((), jnp.bool_, False)]
    assert action_A.shape == (env.num_actions,)


def test_actions_are_clipped_to_their_box(pendulum):
    params = pendulum.default_params
    _, state = start(pendulum, params)
    step = stepper(pendulum)
    far_EA = jnp.array([[-7.0], [-1.0], [0.3], [1.0], [5.0]])
    inside_EA = jnp.array([[-1.0], [-1.0], [0.3], [1.0], [1.0]])
    far, inside = step(state, far_EA, params), step(state, inside_EA, params)
    jax.tree.map(np.testing.assert_array_equal, far, inside)
    assert len(np.unique(np.asarray(far[0])[:, 2])) == E
    space = pendulum.action_space(params)
    assert (space.low, space.high, space.shape) == (-1, 1, (1,))


def test_a_step_leaves_the_state_it_was_given():
    env = BraxEnv("reacher")
    _, state = jax.jit(env.reset_env)(jax.random.key(0), env.default_params)
    before = dict(state.brax.metrics)
    jax.eval_shape(lambda: env.step_env(jax.random.key(0), state, jnp.zeros(2), env.default_params))
    assert all(state.brax.metrics[name] is before[name] for name in before)


def test_gymnaxs_own_loop_runs_it(pendulum):
    assert pendulum == BraxEnv("inverted_pendulum", "spring", episode_length=7)
    assert hash(pendulum) == hash(BraxEnv("inverted_pendulum", "spring", episode_length=7))
    assert pendulum != BraxEnv("inverted_pendulum", "spring")
    assert pendulum.name == "inverted_pendulum"
    obs_F, state = pendulum.reset(jax.random.key(0))
    ends = []
    for t in range(9):
        obs_F, state, reward, _, truncated, info = pendulum.step(jax.random.key(t), state, jnp.zeros(1))
        ends.append(bool(truncated))
        assert reward == 1
    assert ends == [False] * 6 + [True] + [False] * 2
    assert state.time == 2
    assert info["final_observation"].shape == obs_F.shape


def test_gravities_are_mapped_over_and_one_is_the_plain_model(pendulum):
    axes = BraxParams(max_steps_in_episode=None, gravity_scale=0)
    params = BraxParams(max_steps_in_episode=100, gravity_scale=jnp.array([1.0, 3.0, 0.0]))

    def fall(params):
        start_F, state = pendulum.reset_env(jax.random.key(0), params)

        def step(state, _):
            obs_F, state, *_ = pendulum.step_env(jax.random.key(0), state, jnp.zeros(1), params)
            return state, obs_F

        return jnp.concatenate([start_F[None], jax.lax.scan(step, state, length=T)[1]])

    plain_TF = jax.jit(fall)(pendulum.default_params)
    one_TF, three_TF, none_TF = jax.jit(jax.vmap(fall, (axes,)))(params)
    np.testing.assert_allclose(one_TF, plain_TF, atol=1e-6)
    # Near the top the pole falls like exp(w t), w^2 in proportion to gravity; without gravity it drifts on.
    turned = np.abs(np.stack([none_TF, one_TF, three_TF])[:, -1, 1] - plain_TF[0, 1])
    assert turned[2] > 1.5 * turned[1] > 0
    np.testing.assert_allclose(none_TF[:, 3], plain_TF[0, 3], atol=2e-3)


@pytest.mark.slow
def test_scales_are_those_of_mujocos_engine():
    env = BraxEnv("inverted_pendulum", "mjx")
    fields = {
        "gravity_scale": lambda model, scale: model.opt.gravity.__imul__(scale),
        "mass_scale": lambda model, scale: [x.__imul__(scale) for x in (model.body_mass, model.body_inertia)],
        "gear_scale": lambda model, scale: model.actuator_gear.__imul__(scale),
    }
    scale_S = np.array([1.0, 1.7, 0.4], np.float32)
    # One row a scale that is changed by itself, then all at once.
    table = np.ones((len(fields) * 3 + 1, len(fields)), np.float32)
    for column in range(len(fields)):
        table[3 * column : 3 * column + 3, column] = scale_S
    table[-1] = [0.5, 2.3, 1.9]
    names = list(fields)
    steps, action = 3, 0.6

    def run(row):
        params = env.default_params.replace(**dict(zip(names, row, strict=True)))
        start_F, state = env.reset_env(jax.random.key(0), params)

        def step(state, _):
            obs_F, state, *_ = env.step_env(jax.random.key(0), state, jnp.full(1, action), params)
            return state, obs_F

        return start_F, jax.lax.scan(step, state, length=steps)[1][-1]

    start_RF, obs_RF = jax.jit(jax.vmap(run))(table)
    start_F = start_RF[0]
    for row, obs_F in zip(table, np.asarray(obs_RF), strict=True):
        model = mujoco.MjModel.from_xml_path(str(_model_file(env)))
        model.opt.timestep = float(env.brax.sys.opt.timestep)
        for name, scale in zip(names, row, strict=True):
            fields[name](model, float(scale))
        data = mujoco.MjData(model)
        data.qpos, data.qvel = np.split(np.asarray(start_F, float), 2)
        data.ctrl = 3 * action
        for _ in range(steps * 2):
            mujoco.mj_step(model, data)
        np.testing.assert_allclose(obs_F, np.concatenate([data.qpos, data.qvel]), rtol=2e-4, atol=2e-4)
    assert len(np.unique(np.round(np.asarray(obs_RF)[:, 2], 3))) > 5


def _model_file(env):
    return Path(sys.modules[type(env.brax).__module__].__file__).parent / "assets" / f"{env.name}.xml"


def test_friction_reaches_the_contacts():
    env = BraxEnv("hopper", "generalized")
    _, state = jax.eval_shape(env.reset_env, jax.random.key(0), env.default_params)
    links = jax.tree.map(lambda x: jnp.zeros(x.shape), state.brax.pipeline_state.x)

    def friction(scale):
        with brax_allowed():
            from brax import contact

            system = env.scaled(env.default_params.replace(friction_scale=scale)).sys
            return contact.get(system, links).friction

    plain, more, less = (np.asarray(jax.jit(friction)(scale)) for scale in (None, 1.5, 0.25))
    assert plain.size
    assert plain.min() > 0
    np.testing.assert_allclose(more, 1.5 * plain, rtol=1e-6)
    np.testing.assert_allclose(less, 0.25 * plain, rtol=1e-6)


def test_a_mass_scale_without_effect_is_refused():
    env = BraxEnv("ant", "spring")
    with pytest.raises(ValueError, match=r"mass_scale has no effect in ant on spring"):
        env.reset_env(jax.random.key(0), env.default_params.replace(mass_scale=2.0))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "half_cheetah"}, r"'half_cheetah'; did you mean 'halfcheetah'"),
        ({"name": "Ant"}, r"'Ant'; did you mean 'ant'"),
        ({"name": "xxxxxxxx"}, r"expected one of ant, halfcheetah"),
        ({"name": "swimmer"}, r"name is 'swimmer', which does not work: its fluid forces call jnp\.clip"),
        ({"name": "fast"}, r"name is 'fast', which does not work: it is a stand-in"),
        ({"backend": "mujoco"}, r"backend is 'mujoco', expected one of generalized, positional, spring, mjx"),
        ({"episode_length": 0}, r"episode_length is 0, expected at least 1"),
        ({"action_repeat": -2}, r"action_repeat is -2, expected at least 1"),
    ],
)
def test_what_does_not_work_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        BraxEnv(**arguments)


def test_an_action_of_another_shape_is_refused(pendulum):
    params = pendulum.default_params
    _, state = jax.eval_shape(pendulum.reset_env, jax.random.key(0), params)
    with pytest.raises(ValueError, match=r"action has shape \(3,\), expected \(A,\) = \(1,\)"):
        jax.eval_shape(lambda s: pendulum.step_env(jax.random.key(0), s, jnp.zeros(3), params), state)


def test_options_reach_brax():
    env = BraxEnv("hopper", options=(("exclude_current_positions_from_observation", False),))
    assert env.observation_size == BraxEnv("hopper").observation_size + 1


def test_brax_comes_without_its_noise(tmp_path):
    program = """
import jax, sys
from rl.envs.brax_env import BraxEnv
assert "brax" not in sys.modules
env = BraxEnv("halfcheetah", "generalized")
state = jax.eval_shape(env.reset_env, jax.random.key(0), env.default_params)[1]
jax.eval_shape(lambda s: env.step_env(jax.random.key(0), s, jax.numpy.zeros(6), env.default_params), state)
"""
    root = Path(__file__).resolve().parents[3]
    run = subprocess.run(
        [sys.executable, "-W", "always", "-c", program],
        env=os.environ | {"PYTHONPATH": str(root)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert run.stdout == ""
    assert [line for line in run.stderr.splitlines() if "brax" in line.lower() or "mujoco" in line.lower()] == []
    assert list(tmp_path.iterdir()) == []


def test_other_warnings_are_not_hidden():
    with brax_allowed(), pytest.warns(UserWarning, match="another"):
        warnings.warn("another", UserWarning, stacklevel=1)
