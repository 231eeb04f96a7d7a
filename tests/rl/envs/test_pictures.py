"""The pictures say what the states say: who stands where, what is a wall, how far a pole leans. Files open again."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from rl.envs import pictures, render
from rl.envs.make import ActionRepeat, RememberLast, make, unwrapped
from rl.envs.render import FLOOR, GOOD, INK, LINE, PALETTE, PAPER, SWITCH, WALL

pytestmark = pytest.mark.usefixtures("quick_compile")


def start(name, **options):
    env, params = make(name, **options)
    return env, jax.jit(env.reset_env)(jax.random.key(0), params)[1], params


def with_values(state, **values):
    return replace(state, **{name: jnp.asarray(value) for name, value in values.items()})


def cells(picture, rows, columns):
    """(rows, columns, cell, cell, 3)"""
    return picture.reshape(rows, picture.shape[0] // rows, columns, -1, 3).swapaxes(1, 2)


def is_colour(picture, colour):
    return (picture == colour).all(-1)


def middles(picture, rows, columns, colour):
    """Cells with a colour in their middle, as a set of (row, column)."""
    blocks = cells(picture, rows, columns)
    middle = blocks[:, :, blocks.shape[2] // 2, blocks.shape[2] // 2]
    return set(map(tuple, np.argwhere(is_colour(middle, colour)).tolist()))


def corners(picture, rows, columns, colour):
    """Cells with a colour near their upper left corner, which an agent leaves free."""
    blocks = cells(picture, rows, columns)
    at = blocks.shape[2] // 8
    return set(map(tuple, np.argwhere(is_colour(blocks[:, :, at, at], colour)).tolist()))


def places(mask):
    return set(map(tuple, np.argwhere(np.asarray(mask)).tolist()))


def centre(mask):
    """(right, down) of the middle of a mask, in pixels."""
    down, right = np.argwhere(mask).mean(0)
    return np.array([right, down])


@pytest.mark.parametrize("name", ["FourRooms-misc", "MetaMaze-misc"])
def test_rooms(name):
    env, state, params = start(name)
    open_ = np.asarray(unwrapped(env, state)[0].env_map)
    side = 20 * len(open_)
    for agent in np.argwhere(open_)[5::17]:
        for goal in np.argwhere(open_)[[0, -3]]:
            picture = pictures.frame(env, with_values(state, pos=agent, goal=goal), params, side=side)
            assert picture.shape == (side, side, 3)
            assert picture.dtype == np.uint8
            assert middles(picture, *open_.shape, INK) == {tuple(agent)}
            assert corners(picture, *open_.shape, GOOD) == {tuple(goal)}
            assert corners(picture, *open_.shape, WALL) == places(~open_)


def test_frozen_lake():
    env, state, params = start("FrozenLake-misc")
    holes = {(1, 1), (1, 3), (2, 3), (3, 0)}
    for position in range(16):
        picture = pictures.frame(env, with_values(state, position=position), params, side=164)
        assert middles(picture, 4, 4, INK) == {divmod(position, 4)}
        assert corners(picture, 4, 4, PALETTE[0]) == holes
        assert corners(picture, 4, 4, GOOD) == {(3, 3)}


def test_deep_sea_down_to_the_bottom():
    env, state, params = start("DeepSea-bsuite", size=5)
    step = jax.jit(env.step_env)
    for depth in range(6):
        assert int(state.row) == depth
        picture = pictures.frame(env, state, params, side=180)
        assert picture.shape == (180, 150, 3)
        assert middles(picture, 6, 5, INK) == {(depth, int(state.column))}
        assert corners(picture, 6, 5, GOOD) == {(4, 4)}
        if depth < 5:
            right = state.action_mapping[state.row, state.column]
            _, state, *_ = step(jax.random.key(0), state, right, params)


def test_catch():
    env, state, params = start("Catch-bsuite", rows=7, columns=4)
    for ball_y, ball_x, paddle_x in ((0, 3, 0), (4, 1, 2), (6, 2, 2)):
        at = with_values(state, ball_y=ball_y, ball_x=ball_x, paddle_x=paddle_x)
        picture = pictures.frame(env, at, params, side=211)
        assert picture.shape == (210, 120, 3)
        assert corners(picture, 7, 4, INK) == {(6, paddle_x)}
        assert middles(picture, 7, 4, SWITCH) == {(ball_y, ball_x)}


@pytest.mark.parametrize(
    ("name", "agent", "tiles"),
    [
        (
            "Breakout-MinAtar",
            lambda s: (9, s.pos),
            {PALETTE[2]: lambda s: places(s.brick_map)},
        ),
        (
            "Asterix-MinAtar",
            lambda s: (s.player_y, s.player_x),
            {PALETTE[7]: lambda s: {(y, x) for x, y, _, gold, here in s.entities.tolist() if here and not gold}},
        ),
        ("Freeway-MinAtar", lambda s: (s.pos, 4), {PALETTE[0]: lambda s: {(y, x) for x, y, *_ in s.cars.tolist()}}),
        ("SpaceInvaders-MinAtar", lambda s: (9, s.pos), {PALETTE[8]: lambda s: places(s.alien_map)}),
        ("Seaquest-MinAtar", lambda s: (s.sub_y, s.sub_x), {}),
    ],
)
def test_minatar(name, agent, tiles):
    env, state, params = start(name)
    step = jax.jit(env.step_env)
    seen = set()
    for time in range(30):
        k_act, k_step = jax.random.split(jax.random.fold_in(jax.random.key(0), time))
        _, state, _, terminated, _ = step(k_step, state, env.action_space(params).sample(k_act), params)
        if terminated:
            break
        if time % 4:
            continue
        picture = pictures.frame(env, state, params, side=200)
        at = tuple(map(int, agent(state)))
        seen.add(at)
        assert middles(picture, 10, 10, INK) == {at}
        for colour, where in tiles.items():
            assert corners(picture, 10, 10, colour) == where(state) - {at}
    assert len(seen) > 1


def test_the_ball_of_breakout_is_seen_on_a_brick():
    env, state, params = start("Breakout-MinAtar")
    for y, x in ((5, 2), (1, 7)):
        picture = pictures.frame(env, with_values(state, ball_y=y, ball_x=x), params, side=200)
        assert middles(picture, 10, 10, SWITCH) == {(y, x)}


def test_pong():
    env, state, params = start("Pong-misc")
    picture = pictures.frame(env, with_values(state, paddle_centers=[4.0, 20.0]), params, side=360)
    paddles = {(row, 0) for row in range(2, 7)} | {(row, 39) for row in range(18, 23)}
    assert middles(picture, 30, 40, INK) == paddles


def test_the_cart_moves_and_the_pole_leans():
    env, state, params = start("CartPole-v1")
    carts = []
    for x, theta in ((-2.0, 0.0), (0.0, 0.3), (1.0, -0.7)):
        picture = pictures.frame(env, with_values(state, x=x, theta=theta), params, side=600)
        cart, pole = centre(is_colour(picture, INK)), is_colour(picture, SWITCH)
        carts.append(cart[0])
        spread = np.cov((np.argwhere(pole) * (-1, 1)).T)
        up, right = np.linalg.eigh(spread)[1][:, -1]
        assert np.arctan(right / up) == pytest.approx(theta, abs=0.02)
        # Above the cart, and to the side it leans to.
        assert centre(pole)[1] < cart[1]
        assert np.sign(round((centre(pole) - cart)[0])) == np.sign(theta)
    assert np.diff(carts)[0] / np.diff(carts)[1] == pytest.approx(2.0, rel=0.02)


@pytest.mark.parametrize("theta", [0.0, 0.8, -2.5])
def test_the_pendulum_hangs_where_its_angle_says(theta):
    env, state, params = start("Pendulum-v1")
    still, left, right = (
        pictures.frame(env, with_values(state, theta=theta, last_u=torque), params, side=240)
        for torque in (0.0, 1.5, -1.5)
    )
    rod = centre(is_colour(still, INK)) - 119.5
    along = np.array([-np.sin(theta), -np.cos(theta)])
    np.testing.assert_allclose(rod / np.linalg.norm(rod), along, atol=0.03)
    assert not is_colour(still, SWITCH).any()
    # A torque that turns counterclockwise points to the left of the rod as seen from the pivot.
    side = np.array([along[1], -along[0]])
    for picture, sign in ((left, 1), (right, -1)):
        arrow = centre(is_colour(picture, SWITCH)) - 119.5
        assert sign * arrow @ side > 10


def test_the_links_of_the_acrobot():
    env, state, params = start("Acrobot-v1")
    for first, second in ((0.0, 0.0), (0.9, -0.5), (2.5, 1.5)):
        at = with_values(state, joint_angle1=first, joint_angle2=second)
        picture = pictures.frame(env, at, params, side=440)
        both = first + second
        upper = np.array([np.sin(first), np.cos(first)]) / 2
        lower = np.array([np.sin(both), np.cos(both)]) / 2
        # Half a link is 50 pixels; the lower one covers an end of the upper.
        np.testing.assert_allclose(centre(is_colour(picture, INK)) - 219.5, 100 * upper, atol=6)
        np.testing.assert_allclose(centre(is_colour(picture, PALETTE[2])) - 219.5, 100 * (2 * upper + lower), atol=6)
        assert is_colour(picture, GOOD)[115:125].any()


@pytest.mark.parametrize("name", ["MountainCar-v0", "MountainCarContinuous-v0"])
def test_the_car_stands_on_the_hill(name):
    env, state, params = start(name)
    wheels = []
    positions = np.array([-1.2, -np.pi / 6, -0.1, 0.4])
    for position in positions:
        picture = pictures.frame(env, with_values(state, position=position), params, side=480)
        assert is_colour(picture, GOOD).any()
        right, down = centre(is_colour(picture, SWITCH))
        wheels.append((right, down))
        # Within a few pixels below the wheels begins the ground, and above the car is air.
        assert is_colour(picture, LINE)[int(down) + 20, int(right)]
        assert is_colour(picture, PAPER)[int(down) - 60, int(right)]
    wheels = np.array(wheels)
    # A wheel stands a little off the slope, so the horizontal place is exact to the radius of a wheel.
    fitted = np.polyfit(positions, wheels[:, 0], 1)
    np.testing.assert_allclose(np.polyval(fitted, positions), wheels[:, 0], atol=8)
    assert np.argmax(wheels[:, 1]) == 1


def test_edges_are_smooth():
    env, state, params = start("FourRooms-misc")
    blocks = cells(pictures.frame(env, state, params, side=260), 13, 13)
    colours = np.unique(blocks[4, 1].reshape(-1, 3), axis=0)
    assert len(colours) > len({INK, PAPER, FLOOR, LINE}) + 5


def test_wrapped_environments_and_our_own():
    env, state, params = start("FourRooms-misc")
    wrapped = RememberLast(ActionRepeat(env, 2))
    _, wrapped_state = wrapped.reset_env(jax.random.key(0), params)
    np.testing.assert_array_equal(pictures.frame(wrapped, wrapped_state, params), pictures.frame(env, state, params))
    ours, state, params = start("GridworldPinpad", size=5, colours=3, walls=2)
    np.testing.assert_array_equal(pictures.frame(ours, state, params, side=205), render.frame(ours, state, cell=41))


def test_an_episode_is_captioned_and_saved(tmp_path):
    env, state, params = start("CartPole-v1")
    states, rewards = [state], []
    for _ in range(6):
        _, state, reward, *_ = env.step_env(jax.random.key(0), state, 1, params)
        states.append(state)
        rewards.append(reward)
    state_S = jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)
    taken = pictures.frames(env, state_S, jnp.stack(rewards), params, side=310)
    assert len(taken) == 7
    for step, (picture, state) in enumerate(zip(taken, states, strict=True)):
        plain = pictures.frame(env, state, params, side=310)
        expected = pictures.captioned(plain, step=step, reward=float(step > 0), total=step)
        np.testing.assert_array_equal(picture, expected)
        np.testing.assert_array_equal(picture[28:], plain)
    pictures.gif(taken, tmp_path / "episode.gif", fps=20)
    with Image.open(tmp_path / "episode.gif") as film:
        assert film.n_frames == 7
        durations = []
        for index in range(7):
            film.seek(index)
            durations.append(film.info["duration"])
            shown = np.asarray(film.convert("RGB")).astype(int)
            assert np.abs(shown - taken[index]).mean() < 1
        assert durations == [50] * 7
    pictures.png(taken[0], tmp_path / "first.png")
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "first.png")), taken[0])


def test_captions_show_each_number():
    picture = np.full((120, 120, 3), 255, np.uint8)
    one = pictures.captioned(picture, step=3, reward=0.5, total=2.5)
    assert one.shape == (148, 300, 3)
    thirds = [slice(0, 100), slice(100, 200), slice(200, 300)]
    for changed, where in zip(({"step": 4}, {"reward": 0.25}, {"total": 2}), thirds, strict=True):
        other = pictures.captioned(picture, **({"step": 3, "reward": 0.5, "total": 2.5} | changed))
        differs = (one != other).any((0, 2))
        assert differs[where].any()
        assert differs.sum() == differs[where].sum()


def test_what_cannot_be_drawn_says_why(tmp_path):
    env, state, params = start("Reacher-misc")
    with pytest.raises(ValueError, match="no picture of Reacher-misc"):
        pictures.frame(env, state, params)
    env, state, params = start("CartPole-v1")
    with pytest.raises(ValueError, match="side is 50"):
        pictures.frame(env, state, params, side=50)
    batch = jax.tree.map(lambda x: jnp.stack([x, x, x]), state)
    with pytest.raises(ValueError, match=r"batch of shape \(3,\)"):
        pictures.frame(env, batch, params)
    with pytest.raises(ValueError, match="expected 6, one more"):
        pictures.frames(env, batch, jnp.zeros(5), params)
    picture = pictures.frame(env, state, params)
    for fps in (0, 51):
        with pytest.raises(ValueError, match=f"fps is {fps}"):
            pictures.gif([picture], tmp_path / "a.gif", fps=fps)
    for frames in ([], [picture, picture[1:]]):
        with pytest.raises(ValueError, match="one and the same"):
            pictures.gif(frames, tmp_path / "a.gif")
