"""Pictures of gymnax environments: grid worlds, MinAtar, Pong, and the classic control tasks; still or as a GIF.

Drawn with Pillow four times too large and averaged down, so that edges are smooth, in the colours of `rl.envs.render`.
Whatever the agent moves is in ink, goals are green, and what moves by itself has colours of its own. Grid worlds and
MinAtar have one cell for each cell of the environment; physical tasks are to scale, with their thresholds in grey.
"""

from collections.abc import Sequence
from functools import partial
from math import atan, cos, pi, sin
from pathlib import Path
from typing import Any

import jax
import numpy as np
from gymnax.environments.bsuite.catch import Catch
from gymnax.environments.bsuite.deep_sea import DeepSea
from gymnax.environments.classic_control.acrobot import Acrobot
from gymnax.environments.classic_control.cartpole import CartPole
from gymnax.environments.classic_control.continuous_mountain_car import ContinuousMountainCar
from gymnax.environments.classic_control.mountain_car import MountainCar
from gymnax.environments.classic_control.pendulum import Pendulum
from gymnax.environments.minatar.asterix import MinAsterix
from gymnax.environments.minatar.breakout import MinBreakout
from gymnax.environments.minatar.freeway import MinFreeway
from gymnax.environments.minatar.seaquest import MinSeaquest
from gymnax.environments.minatar.space_invaders import MinSpaceInvaders
from gymnax.environments.misc.frozen_lake import GOAL, HOLE, FrozenLake
from gymnax.environments.misc.meta_maze import MetaMaze
from gymnax.environments.misc.pong import Pong
from gymnax.environments.misc.rooms import FourRooms
from PIL import Image, ImageDraw, ImageFont

from rl.envs import render
from rl.envs.gridworld_pinpad import GridworldPinpad
from rl.envs.make import unwrapped
from rl.envs.render import FAINT, FLOOR, GOOD, INK, LINE, PALETTE, PAPER, RGB, SWITCH, WALL

INDIGO, CYAN, TEAL, _, OLIVE, SAND, ROSE, WINE, PURPLE = PALETTE
ICE: RGB = (222, 238, 246)

Glyph = tuple[int, RGB, str]
"""Channel of an observation, the colour of its cells, and their shape: a tile, a ball, a dot, or a dot to one side."""

# In drawing order. Trails are pale; the faster a car of Freeway, the darker its trail.
_PALE: tuple[RGB, ...] = ((129, 120, 179), (149, 141, 190), (169, 162, 201), (188, 183, 212), (208, 204, 222))
BREAKOUT: tuple[Glyph, ...] = ((3, TEAL, "tile"), (2, SAND, "dot"), (0, INK, "tile"), (1, SWITCH, "ball"))
ASTERIX: tuple[Glyph, ...] = ((2, LINE, "tile"), (1, WINE, "tile"), (3, SAND, "tile"), (0, INK, "ball"))
FREEWAY: tuple[Glyph, ...] = (
    *((2 + index, colour, "tile") for index, colour in enumerate(_PALE)),
    (1, INDIGO, "tile"),
    (0, INK, "ball"),
)
SPACE_INVADERS: tuple[Glyph, ...] = (
    (1, PURPLE, "tile"),
    (2, PAPER, "left"),
    (3, PAPER, "right"),
    (4, TEAL, "dot"),
    (5, SWITCH, "dot"),
    (0, INK, "tile"),
)
SEAQUEST: tuple[Glyph, ...] = (
    (7, TEAL, "tile"),
    (8, SAND, "tile"),
    (3, LINE, "tile"),
    (5, ROSE, "tile"),
    (6, WINE, "tile"),
    (9, SAND, "ball"),
    (1, FAINT, "tile"),
    (0, INK, "tile"),
    (2, TEAL, "dot"),
    (4, SWITCH, "dot"),
)
PONG: tuple[Glyph, ...] = ((2, SAND, "ball"), (0, INK, "tile"), (1, SWITCH, "ball"))

_FINE = 4


def frame(env: Any, state: Any, params: Any, *, side: int = 360) -> np.ndarray:
    """Picture (height, width, 3) in uint8 of one state; its longer edge has at most `side` pixels.

    `env` may be wrapped by `rl.envs.make`. Raises ValueError for a batch of states, a `side` below 120, and an
    environment that has no picture.
    """
    if side < 120:
        raise ValueError(f"frame: side is {side}, expected at least 120 pixels")
    env, state = unwrapped(env, state)
    if np.ndim(state.time):
        raise ValueError(f"frame: state is a batch of shape {np.shape(state.time)}, expected a single state")
    match env:
        case GridworldPinpad():
            return render.frame(env, state, cell=side // env.size)
        case MinBreakout():
            return _channels(env, state, params, BREAKOUT, side)
        case MinAsterix():
            return _channels(env, state, params, ASTERIX, side)
        case MinFreeway():
            return _channels(env, state, params, FREEWAY, side)
        case MinSpaceInvaders():
            return _channels(env, state, params, SPACE_INVADERS, side)
        case MinSeaquest():
            return _channels(env, state, params, SEAQUEST, side)
        case Pong():
            return _channels(env, state, params, PONG, side)
    state, params = jax.device_get((state, params))
    match env:
        case FourRooms() | MetaMaze():
            return _rooms(env, state, side)
        case FrozenLake():
            return _frozen_lake(env, state, side)
        case DeepSea():
            return _deep_sea(env, state, side)
        case Catch():
            return _catch(env, state, side)
        case CartPole():
            return _cart_pole(state, params, side)
        case Acrobot():
            return _acrobot(state, params, side)
        case MountainCar() | ContinuousMountainCar():
            return _mountain_car(state, params, side)
        case Pendulum():
            return _pendulum(state, params, side)
    raise ValueError(f"frame: there is no picture of {env.name}; grid worlds, MinAtar and classic control have one")


def captioned(picture: np.ndarray, *, step: int, reward: float, total: float) -> np.ndarray:
    """The picture under a line with the step, its reward, and the return so far; at least 300 pixels wide."""
    height, width, _ = picture.shape
    sheet = Image.new("RGB", (max(width, 300), height + 28), PAPER)
    sheet.paste(Image.fromarray(picture), ((sheet.width - width) // 2, 28))
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(14)
    draw.text((6, 14), f"step {step}", INK, font, anchor="lm")
    draw.text((sheet.width // 2, 14), f"reward {reward:.3g}", INK, font, anchor="mm")
    draw.text((sheet.width - 6, 14), f"return {total:.4g}", INK, font, anchor="rm")
    return np.asarray(sheet)


def frames(env: Any, state_S: Any, reward_T: Any, params: Any, *, side: int = 360) -> list[np.ndarray]:
    """An episode: a captioned picture of each of S = T + 1 states, whose leaves have that axis first.

    `reward_T` rewards of the steps between them. Raises ValueError where the lengths do not agree.
    """
    lengths = {np.shape(leaf)[:1] for leaf in jax.tree.leaves(state_S)}
    if lengths != {(len(reward_T) + 1,)}:
        raise ValueError(f"frames: state_S has lengths {lengths}, expected {len(reward_T) + 1}, one more than reward_T")
    reward_S = np.append(0.0, np.asarray(reward_T, np.float64))
    pictures = []
    for step, (reward, total) in enumerate(zip(reward_S, reward_S.cumsum(), strict=True)):
        state = jax.tree.map(lambda leaf, step=step: leaf[step], state_S)
        pictures.append(captioned(frame(env, state, params, side=side), step=step, reward=reward, total=total))
    return pictures


def gif(frames: Sequence[np.ndarray], path: str | Path, fps: float = 10) -> None:
    """Write an endless animation of `fps` pictures a second, to the hundredth of a second that the format has.

    Neighbours that are equal are stored as one that lasts longer. Raises ValueError for no frames, frames of different
    sizes, and more than 50 a second, which viewers slow down.
    """
    if not 0 < fps <= 50:
        raise ValueError(f"gif: fps is {fps}, expected more than 0 and at most 50")
    if len({picture.shape for picture in frames}) != 1:
        raise ValueError(f"gif: frames have shapes {[picture.shape for picture in frames]}, expected one and the same")
    milliseconds = 10 * round(100 / fps)
    render.episode_gif(path, frames, milliseconds=milliseconds, hold=milliseconds)


def png(picture: np.ndarray, path: str | Path) -> None:
    """Write one picture."""
    Image.fromarray(picture).save(path, format="PNG")


class _Sheet:
    """A picture under construction, in lengths of the environment; `left` and `top` are the coordinates of its corner,
    and `up` is -1 where the second coordinate grows downwards."""

    def __init__(self, width: float, height: float, side: int, left: float = 0, top: float = 0, up: int = -1):
        self.unit = int(side / max(width, height)) if up < 0 else side / max(width, height)
        self.left, self.top, self.up, self.fine = left, top, up, self.unit * _FINE
        size = round(width * self.unit) * _FINE, round(height * self.unit) * _FINE
        self.image = Image.new("RGB", size, LINE if up < 0 else PAPER)
        self.draw = ImageDraw.Draw(self.image)

    def at(self, x: float, y: float) -> tuple[float, float]:
        """Pixel of a point."""
        return (x - self.left) * self.fine, (self.top - y) * self.up * self.fine

    def polygon(self, points: Sequence[tuple[float, float]], colour: RGB) -> None:
        self.draw.polygon([self.at(*point) for point in points], fill=colour)

    def box(self, x: float, y: float, width: float, height: float, colour: RGB, corner: float = 0) -> None:
        """A rectangle around a point, with round corners."""
        (x1, y1), (x2, y2) = self.at(x - width / 2, y - height / 2), self.at(x + width / 2, y + height / 2)
        edges = round(x1), round(min(y1, y2)), round(x2) - 1, round(max(y1, y2)) - 1
        self.draw.rounded_rectangle(edges, corner * self.fine, colour)

    def disc(self, x: float, y: float, radius: float, colour: RGB) -> None:
        self.box(x, y, 2 * radius, 2 * radius, colour, radius)

    def line(self, points: Sequence[tuple[float, float]], width: float, colour: RGB) -> None:
        """A line with round ends and bends."""
        self.draw.line([self.at(*point) for point in points], colour, round(width * self.fine))
        for point in points:
            self.disc(*point, width / 2, colour)

    def tile(self, row: float, column: float, colour: RGB) -> None:
        """A cell of a grid."""
        # Lines between cells of a few pixels would be all there is to see.
        width = 0.94 if self.unit >= 12 else 1.0
        self.box(column + 0.5, row + 0.5, width, width, colour)

    def agent(self, row: float, column: float) -> None:
        self.disc(column + 0.5, row + 0.5, 0.37, PAPER)
        self.disc(column + 0.5, row + 0.5, 0.32, INK)

    def goal(self, row: float, column: float) -> None:
        self.tile(row, column, GOOD)
        self.disc(column + 0.5, row + 0.5, 0.3, PAPER)
        self.disc(column + 0.5, row + 0.5, 0.18, GOOD)

    def picture(self) -> np.ndarray:
        return np.asarray(self.image.reduce(_FINE))


def _grid(kinds: np.ndarray, colours: dict[int, RGB], side: int) -> _Sheet:
    sheet = _Sheet(kinds.shape[1], kinds.shape[0], side)
    for (row, column), kind in np.ndenumerate(kinds):
        sheet.tile(row, column, colours[int(kind)])
    return sheet


def _rooms(env: FourRooms | MetaMaze, state: Any, side: int) -> np.ndarray:
    sheet = _grid(np.asarray(env.env_map), {0: WALL, 1: FLOOR}, side)
    sheet.goal(*state.goal)
    sheet.agent(*state.pos)
    return sheet.picture()


def _frozen_lake(env: FrozenLake, state: Any, side: int) -> np.ndarray:
    tiles = np.asarray(env.desc)
    sheet = _grid(tiles == HOLE, {0: ICE, 1: INDIGO}, side)
    sheet.goal(*np.argwhere(tiles == GOAL)[0])
    sheet.agent(*divmod(int(state.position), env.ncol))
    return sheet.picture()


def _deep_sea(env: DeepSea, state: Any, side: int) -> np.ndarray:
    # Cells right of the diagonal are never reached; the row below the last is where every episode ends.
    sheet = _grid(np.tri(env.size + 1, env.size), {0: LINE, 1: ICE}, side)
    for column in range(env.size):
        sheet.tile(env.size, column, SAND)
    sheet.goal(env.size - 1, env.size - 1)
    sheet.agent(int(state.row), int(state.column))
    return sheet.picture()


def _catch(env: Catch, state: Any, side: int) -> np.ndarray:
    sheet = _grid(np.zeros((env.rows, env.columns)), {0: FLOOR}, side)
    sheet.tile(int(state.paddle_y), int(state.paddle_x), INK)
    sheet.disc(int(state.ball_x) + 0.5, int(state.ball_y) + 0.5, 0.32, SWITCH)
    return sheet.picture()


@partial(jax.jit, static_argnums=0)
def _observe(env: Any, state: Any, params: Any) -> jax.Array:
    return env.get_obs(state, params)


def _channels(env: Any, state: Any, params: Any, glyphs: Sequence[Glyph], side: int) -> np.ndarray:
    obs_HWC = np.asarray(_observe(env, state, params))
    sheet = _grid(np.zeros(obs_HWC.shape[:2]), {0: FLOOR}, side)
    for channel, colour, shape in glyphs:
        for row, column in np.argwhere(obs_HWC[..., channel]):
            match shape:
                case "tile":
                    sheet.tile(row, column, colour)
                case "ball":
                    sheet.disc(column + 0.5, row + 0.5, 0.4, colour)
                case "dot":
                    sheet.disc(column + 0.5, row + 0.5, 0.2, colour)
                case _:
                    sheet.disc(column + (0.25 if shape == "left" else 0.75), row + 0.5, 0.12, colour)
    return sheet.picture()


def _cart_pole(state: Any, params: Any, side: int) -> np.ndarray:
    edge, length = float(params.x_threshold), 2 * float(params.length)
    sheet = _Sheet(2 * edge + 0.8, length + 0.7, side, -edge - 0.4, length + 0.4, up=1)
    x, theta, limit = float(state.x), float(state.theta), float(params.theta_threshold_radians)
    sheet.line([(-edge, 0), (edge, 0)], 0.03, FAINT)
    for end in (-edge, edge):
        sheet.line([(end, -0.1), (end, 0.1)], 0.03, FAINT)
    for angle in (-limit, limit):
        sheet.line([(x, 0.15), (x + length * sin(angle), 0.15 + length * cos(angle))], 0.015, FAINT)
    sheet.box(x, 0.05, 0.56, 0.3, INK, 0.05)
    sheet.line([(x, 0.15), (x + length * sin(theta), 0.15 + length * cos(theta))], 0.09, SWITCH)
    sheet.disc(x, 0.15, 0.03, PAPER)
    return sheet.picture()


def _acrobot(state: Any, params: Any, side: int) -> np.ndarray:
    first, second = float(state.joint_angle1), float(state.joint_angle1 + state.joint_angle2)
    lengths = float(params.link_length_1), float(params.link_length_2)
    reach = sum(lengths) + 0.2
    sheet = _Sheet(2 * reach, 2 * reach, side, -reach, reach, up=1)
    elbow = lengths[0] * sin(first), -lengths[0] * cos(first)
    tip = elbow[0] + lengths[1] * sin(second), elbow[1] - lengths[1] * cos(second)
    # The height that ends an episode is 1 whatever the lengths of the links.
    sheet.line([(-reach + 0.1, 1), (reach - 0.1, 1)], 0.02, GOOD)
    sheet.line([(0, 0), elbow], 0.18, INK)
    sheet.line([elbow, tip], 0.18, TEAL)
    for joint in ((0, 0), elbow):
        sheet.disc(*joint, 0.05, PAPER)
    return sheet.picture()


def _mountain_car(state: Any, params: Any, side: int) -> np.ndarray:
    left, right = float(params.min_position) - 0.08, float(params.max_position) + 0.08
    sheet = _Sheet(right - left, 1.3, side, left, 1.25, up=1)
    xs = np.linspace(left, right, 200)
    sheet.polygon([(left, -0.05), *((x, _hill(x)) for x in xs), (right, -0.05)], LINE)
    sheet.line([(x, _hill(x)) for x in xs], 0.012, FAINT)
    goal = float(params.goal_position)
    sheet.line([(goal, _hill(goal)), (goal, _hill(goal) + 0.2)], 0.014, INK)
    sheet.polygon([(goal - along, _hill(goal) + high) for along, high in ((0, 0.2), (0.1, 0.16), (0, 0.12))], GOOD)
    x = float(state.position)
    slope = atan(0.45 * 3 * cos(3 * x))

    def on_car(along: float, above: float) -> tuple[float, float]:
        return x + along * cos(slope) - above * sin(slope), _hill(x) + along * sin(slope) + above * cos(slope)

    sheet.line([on_car(-0.045, 0.085), on_car(0.045, 0.085)], 0.075, INK)
    for along in (-0.05, 0.05):
        sheet.disc(*on_car(along, 0.034), 0.032, PAPER)
        sheet.disc(*on_car(along, 0.034), 0.024, SWITCH)
    return sheet.picture()


def _hill(x: float) -> float:
    return 0.45 * sin(3 * x) + 0.55


def _pendulum(state: Any, params: Any, side: int) -> np.ndarray:
    length, theta, torque = float(params.l), float(state.theta), float(state.last_u)
    reach = length + 0.25
    sheet = _Sheet(2 * reach, 2 * reach, side, -reach, reach, up=1)

    def around(radius: float, angle: float) -> tuple[float, float]:
        return -radius * sin(angle), radius * cos(angle)

    sheet.line([around(length + 0.06, 0), around(length + 0.18, 0)], 0.03, GOOD)
    sheet.line([(0, 0), around(length, theta)], 0.18, INK)
    sheet.disc(0, 0, 0.05, PAPER)
    # The torque as an arc ahead of the rod, a right angle at most.
    ahead = torque / float(params.max_torque) * pi / 2
    if abs(ahead) > 0.02:
        sheet.line([around(0.45, theta + ahead * part / 30) for part in range(31)], 0.05, SWITCH)
        head = theta + ahead
        on = 0.24 if ahead > 0 else -0.24
        sheet.polygon([around(0.35, head), around(0.55, head), around(0.45, head + on)], SWITCH)
    return sheet.picture()
