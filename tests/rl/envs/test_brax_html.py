"""The page carries the trajectory, plays without a network and is well-formed; pictures show the states given."""

import json
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import jax
import mujoco
import numpy as np
import pytest
from PIL import Image

from rl.envs.brax_env import BraxEnv
from rl.envs.brax_html import episode_gif, episode_html, frames

pytestmark = pytest.mark.usefixtures("quick_compile")

T = 7
OPENS_ONLY = {"meta", "input"}


@pytest.fixture(scope="module")
def hopper():
    return BraxEnv("hopper", "spring", action_repeat=3)


@pytest.fixture(scope="module")
def states(hopper):
    """T starts in the place of an episode: their links are where their joints say, in any backend."""
    keys = jax.random.split(jax.random.key(0), T)
    _, states = jax.jit(jax.vmap(hopper.reset_env, (0, None)))(keys, hopper.default_params)
    return jax.tree.map(np.asarray, states)


@pytest.fixture(scope="module")
def page(hopper, states, tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "hopper.html"
    assert episode_html(hopper, states, path, np.arange(T) / 2) == path
    return path.read_text(encoding="utf-8")


class Elements(HTMLParser):
    """Every element with its attributes and text; fails where tags do not match."""

    def __init__(self, page):
        super().__init__()
        self.open, self.found = [], []
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.found.append([tag, dict(attributes), ""])
        if tag not in OPENS_ONLY:
            self.open.append(self.found[-1])

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag

    def handle_data(self, text):
        if self.open:
            self.open[-1][2] += text


def scene_of(page):
    (text,) = (text for tag, attributes, text in Elements(page).found if attributes.get("id") == "trajectory")
    return json.loads(text)


def turned(quaternion, vector):
    rotated = np.zeros(3)
    mujoco.mju_rotVecQuat(rotated, vector, np.asarray(quaternion, float))
    return rotated


def test_poses_are_those_of_mujocos_kinematics(hopper, states, page):
    scene, model = scene_of(page), hopper.brax.sys.mj_model
    data, moved = mujoco.MjData(model), set()
    assert len(scene["poses"]) == T
    assert len(scene["geoms"]) == model.ngeom
    for pose_L7, q in zip(np.array(scene["poses"]), states.brax.pipeline_state.q, strict=True):
        data.qpos = q
        mujoco.mj_forward(model, data)
        np.testing.assert_allclose(pose_L7[:, :3], data.xpos[1:], atol=1e-4)
        aligned = np.abs((pose_L7[:, 3:] * data.xquat[1:]).sum(-1))
        np.testing.assert_allclose(aligned, 1, atol=1e-4)
        for g, geom in enumerate(scene["geoms"]):
            link = pose_L7[geom["link"]] if geom["link"] >= 0 else np.array([0, 0, 0, 1, 0, 0, 0])
            place = link[:3] + turned(link[3:], np.array(geom["pose"][:3]))
            np.testing.assert_allclose(place, data.geom_xpos[g], atol=3e-4)
            moved.add((g, tuple(place.round(2))))
    assert len(moved) > model.ngeom


def test_the_page_says_what_was_simulated(hopper, states, page):
    scene = scene_of(page)
    x = states.brax.pipeline_state.x
    np.testing.assert_allclose(scene["poses"], np.concatenate([x.pos, x.rot], -1), atol=5.1e-5)
    assert [geom["shape"] for geom in scene["geoms"]] == ["plane"] + ["capsule"] * 4
    # Four frames of 2 ms a step of Brax, three of them an action.
    assert scene["seconds"] == 0.024
    assert scene["return"] == [0, 0.5, 1.5, 3, 5, 7.5, 10.5]


def test_the_page_is_well_formed_and_loads_nothing(page):
    elements = Elements(page).found
    assert page.startswith("<!DOCTYPE html>")
    assert {tag for tag, _, _ in elements} >= {"canvas", "button", "input", "script", "title"}
    assert "hopper (spring)" in [text for tag, _, text in elements if tag == "title"]
    assert not any({"src", "href", "srcset", "action"} & set(attributes) for _, attributes, _ in elements)
    assert not any(tag in ("link", "img", "iframe") for tag, _, _ in elements)
    assert not re.search(r"https?:|//[a-z]+\.|\bfetch\(|XMLHttpRequest|\bimport\b|@import|url\(|WebSocket", page)
    assert "%T" not in page


@pytest.mark.parametrize("call", [lambda *a: episode_html(*a, "never.html"), frames])
def test_a_batch_is_refused(hopper, states, call):
    batch = jax.tree.map(lambda x: np.stack([x, x], 1), states)
    with pytest.raises(ValueError, match=r"shape \(7, 2, 6\), expected \(T, Q\) of a single episode"):
        call(hopper, batch)
    with pytest.raises(ValueError, match=r"shape \(6,\), expected \(T, Q\)"):
        call(hopper, jax.tree.map(lambda x: x[0], states))


def test_rewards_of_another_length_and_failed_simulations_are_refused(hopper, states, tmp_path):
    with pytest.raises(ValueError, match=r"reward_T has shape \(3,\), expected \(7,\)"):
        episode_html(hopper, states, tmp_path / "never.html", np.ones(3))
    failed = jax.tree.map(np.array, states)
    failed.brax.pipeline_state.x.pos[4, 1, 2] = np.nan
    with pytest.raises(ValueError, match=r"the pose of frame 4 is not finite"):
        episode_html(hopper, failed, tmp_path / "never.html")
    assert list(tmp_path.iterdir()) == []


class Renderer:
    """In the place of MuJoCo's: paints the height of the hopper's torso as a grey."""

    def __init__(self, model, height, width):
        self.shape = (height, width, 3)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def update_scene(self, data, camera):
        assert camera == "track"
        self.height = data.xpos[1, 2]

    def render(self):
        return np.full(self.shape, 100 * self.height, np.uint8)


def test_pictures_are_of_the_states_in_turn(hopper, states, monkeypatch, tmp_path):
    monkeypatch.setattr(mujoco, "Renderer", Renderer)
    pictures = frames(hopper, states, height=20, width=30)
    assert pictures.shape == (T, 20, 30, 3)
    np.testing.assert_array_equal(pictures[:, 0, 0, 0], (100 * states.brax.pipeline_state.x.pos[:, 0, 2]).astype(int))
    spread = states.replace(brax=states.brax.replace(pipeline_state=states.brax.pipeline_state.replace(
        q=states.brax.pipeline_state.q + np.arange(T)[:, None] * np.eye(6, dtype=np.float32)[1] / 4
    )))  # fmt: skip
    with Image.open(episode_gif(hopper, spread, tmp_path / "hopper.gif", height=20, width=30)) as gif:
        assert (gif.n_frames, gif.size, gif.info["duration"], gif.info["loop"]) == (T, (30, 20), 20, 0)


def test_without_opengl_the_error_says_what_to_do():
    program = """
import jax
from rl.envs.brax_env import BraxEnv
from rl.envs.brax_html import frames
env = BraxEnv("inverted_pendulum")
states = jax.tree.map(
    lambda x: jax.numpy.zeros((1, *x.shape)), jax.eval_shape(env.reset_env, jax.random.key(0), env.default_params)[1]
)
try:
    frames(env, states)
except RuntimeError as error:
    print(error)
"""
    root = Path(__file__).resolve().parents[3]
    run = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | {"PYTHONPATH": str(root), "MUJOCO_GL": "disable"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "MuJoCo's renderer did not start" in run.stdout
    assert "set MUJOCO_GL=egl" in run.stdout
