"""The pictures show what they should: colours, agent, path, switches, captions, and files that open again."""

from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from rl.envs import Episode, GridworldPinpad, episode_frames, episode_gif, episode_picture, episode_png, frame
from rl.envs.render import FLOOR, INK, LINE, PALETTE, PAPER, SWITCH, WALL

# 0 # .     The agent starts in the corner below 0, goes up and right onto 1, bumps into the edge there,
# . . 1     leaves 1 upwards, comes back, and goes down onto 2.
# . . 2
ENV = GridworldPinpad(3, 3, 1)
OBJECTS = np.array([0, 5, 8, 1])
PATH = np.array([6, 3, 4, 5, 5, 2, 5, 8])
CELL = 30


def episode(task, *, path=PATH, gate=None, horizon=None):
    return Episode(ENV, path, OBJECTS, np.array(task), gate, horizon)


def at(picture, cell, down=0.5, right=0.5):
    """The pixel at a fraction of a cell."""
    row, column = divmod(cell, 3)
    return tuple(map(int, picture[int((row + down) * CELL), int((column + right) * CELL)]))


def test_a_board_shows_colours_walls_agent_and_floor():
    picture = frame(ENV, (6, OBJECTS), cell=CELL)
    assert picture.shape == (90, 90, 3)
    assert picture.dtype == np.uint8
    for colour, place in enumerate(OBJECTS[:3]):
        assert at(picture, place, 0.15) == PALETTE[colour]
    assert at(picture, 1) == WALL
    assert at(picture, 6) == INK
    assert at(picture, 4) == FLOOR
    assert tuple(map(int, picture[0, 0])) == LINE
    assert len({PALETTE[0], PALETTE[1], PALETTE[2], WALL, INK, FLOOR, LINE}) == 7


def test_every_coloured_cell_carries_its_number():
    env = GridworldPinpad(4, 12, 0)
    picture = frame(env, (15, np.arange(12)), cell=CELL)
    cells = picture.reshape(4, CELL, 4, CELL, 3).swapaxes(1, 2).reshape(16, CELL, CELL, 3)
    ink = [np.abs(cell.astype(int) - cell[5, 15]).sum(-1)[7:23, 5:25] > 60 for cell in cells[:12]]
    assert all(mask.any() for mask in ink)
    assert all((a != b).any() for i, a in enumerate(ink) for b in ink[:i])


def test_a_state_is_drawn_like_its_arrays():
    _, state = ENV.reset(jax.random.key(0))
    np.testing.assert_array_equal(frame(ENV, state), frame(ENV, (state.agent, state.objects_J)))
    moved = frame(ENV, (jnp.array(4), state.objects_J))
    assert (moved != frame(ENV, (jnp.array(2), state.objects_J))).any()


def test_the_path_is_drawn_and_fades():
    picture = frame(ENV, (5, OBJECTS), trail=PATH[:4], cell=CELL)
    # Between the middles of cells 6 and 3, and of 3 and 4.
    old, new = at(picture, 3, down=0.8), at(picture, 3, right=0.8)
    assert INK < new < old < LINE
    assert at(picture, 6) == PAPER
    assert at(picture, 7) == FLOOR


def test_switches_are_marked_where_they_happened():
    picture = frame(ENV, (6, OBJECTS), switches=[4], cell=CELL)
    assert at(picture, 4, 0.79, 0.79) == SWITCH
    assert at(picture, 3, 0.79, 0.79) == FLOOR


def test_visits_progress_and_legs_follow_from_the_path():
    shown = episode([1, 2, -1], gate=np.array([0.9, 0.1, 0.2, 0.5, 0.4, 0.0, 0.3]))
    assert shown.task == [1, 2]
    # Bumping into the edge is no visit, coming back is one.
    assert shown.visited_T == [-1, -1, 1, -1, -1, 1, 2]
    assert shown.progress_S == [0, 0, 0, 1, 1, 1, 1, 2]
    assert shown.legs == [(0, 3), (3, 6), (6, 7)]
    assert shown.switches == [0, 3]


@pytest.mark.parametrize(
    ("task", "steps", "horizon", "outcome"),
    [
        ([1, 1, 2], 7, None, "success"),
        ([1, 2], 3, None, "unfinished"),
        ([1, 2], 5, 5, "out of time"),
        ([1, 2], 6, 6, "wrong colour 1"),
        ([1], 3, 3, "success"),
        ([1], 0, 3, "unfinished"),
    ],
)
def test_outcomes(task, steps, horizon, outcome):
    shown = episode(task, path=PATH[: steps + 1], horizon=horizon)
    assert shown.outcome[0] == outcome
    assert shown.steps == steps


def test_there_is_a_frame_for_every_state():
    gate = np.zeros(7)
    gate[[0, 3]] = 1
    frames = episode_frames(episode([1, 1, 2], gate=gate, horizon=9), cell=CELL)
    assert len(frames) == 8
    assert {(f.shape, f.dtype) for f in frames} == {(frames[0].shape, np.dtype(np.uint8))}
    # Narrow boards leave room for the caption.
    assert frames[0].shape[1] >= 240
    for before, after in pairwise(frames):
        assert (before != after).any()
    strip = [f[: -3 * CELL] for f in frames]
    switched = [(np.abs(s.astype(int) - SWITCH).sum(-1) < 30).any() for s in strip]
    assert [i for i, seen in enumerate(switched) if seen] == [0, 3]
    marked = [at(f[-3 * CELL :, 75:165], 5, 0.79, 0.79) == SWITCH for f in frames]
    assert marked == [i >= 3 for i in range(8)]
    # The first square of the task is framed until its colour is visited.
    assert tuple(strip[0][4, 10]) == INK
    assert tuple(strip[3][4, 10]) != INK


def test_an_animation_opens_again(tmp_path):
    frames = episode_frames(episode([1, 1, 2]), cell=CELL)
    path = tmp_path / "episode.gif"
    episode_gif(path, frames, milliseconds=90, hold=700)
    with Image.open(path) as animation:
        assert animation.n_frames == len(frames)
        for index, wanted in enumerate(frames):
            animation.seek(index)
            assert animation.info["duration"] == (700 if index == len(frames) - 1 else 90)
            found = np.asarray(animation.convert("RGB"), int)
            assert np.abs(found - wanted).mean() < 0.1
            assert np.abs(found - wanted).max() < 32
            assert tuple(found[0, 0]) == PAPER
    with pytest.raises(ValueError, match="frames is empty"):
        episode_gif(path, [])


@pytest.mark.parametrize("gate", [None, np.linspace(0, 1, 7)])
def test_a_still_shows_a_board_for_every_leg(gate, tmp_path):
    shown = episode([1, 1, 2], gate=gate)
    picture = episode_picture(shown, columns=2, cell=CELL)
    episode_png(tmp_path / "episode.png", shown, columns=2, cell=CELL)
    with Image.open(tmp_path / "episode.png") as still:
        np.testing.assert_array_equal(np.asarray(still), picture)
    # Two boards beside each other, the third under the first.
    corners = [(64 + 24, 12), (64 + 24, 12 + 90 + 12), (64 + 90 + 2 * 24 + 12, 12)]
    for (y, x), (first, last) in zip(corners, shown.legs, strict=True):
        marks = [PATH[step] for step in shown.switches if first <= step < last]
        board = frame(ENV, (PATH[last], OBJECTS), trail=PATH[first : last + 1], switches=marks, cell=CELL)
        np.testing.assert_array_equal(picture[y : y + 90, x : x + 90], board)
    bars = (picture[-60:] == SWITCH).all(-1).any()
    assert bars == (gate is not None)


def test_an_episode_without_steps_is_a_picture_too():
    shown = episode([1], path=PATH[:1])
    assert len(episode_frames(shown)) == 1
    assert episode_picture(shown).ndim == 3


def test_a_still_has_room_for_more_steps_than_pixels():
    shown = episode([2], path=np.array([3, 4] * 500), gate=np.ones(999))
    picture = episode_picture(shown)
    assert (picture[-60:] == SWITCH).all(-1).any()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"agent_S": PATH[:0]}, "agent_S has length 0"),
        ({"objects_J": OBJECTS[:3]}, "objects_J 3, expected at least 1 and 4"),
        ({"gate_T": np.zeros(8)}, "gate_T has length 8, expected 7"),
    ],
)
def test_arrays_that_do_not_agree_are_refused(change, words):
    arguments = {"env": ENV, "agent_S": PATH, "objects_J": OBJECTS, "task_K": np.array([1])} | change
    with pytest.raises(ValueError, match=words):
        Episode(**arguments)


def test_cells_too_small_for_a_number_are_refused():
    with pytest.raises(ValueError, match="cell is 11"):
        frame(ENV, (6, OBJECTS), cell=11)
