"""Pictures of gridworld-pinpad: one state, an animated episode, or a whole episode as one still, leg by leg.

Boards are drawn in plain NumPy, some times too large and averaged down so that edges are smooth; Pillow sets the
captions and writes the files. Colours are Paul Tol's "muted" scheme, which colour-blind readers can tell apart, and
every coloured cell also carries its number. A step at which a switching gate was open is marked by a diamond.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from rl.envs.gridworld_pinpad import EnvState, GridworldPinpad

RGB = tuple[int, int, int]
PALETTE: tuple[RGB, ...] = (
    (51, 34, 136),
    (136, 204, 238),
    (68, 170, 153),
    (17, 119, 51),
    (153, 153, 51),
    (221, 204, 119),
    (204, 102, 119),
    (136, 34, 85),
    (170, 68, 153),
)
INK, PAPER, FAINT = (24, 24, 24), (255, 255, 255), (130, 130, 126)
FLOOR, LINE, WALL, SWITCH = (247, 247, 244), (216, 216, 210), (82, 82, 82), (238, 119, 51)
GOOD, BAD = (17, 119, 51), (176, 30, 50)

_FINE = 3
# Three columns and five rows a digit, one octal number a row.
_DIGITS = ("75557", "26227", "71747", "71717", "55711", "74717", "74757", "71111", "75757", "75717")


@dataclass(frozen=True, eq=False)
class Episode:
    """One episode of T steps as arrays on the host. Raises ValueError where their lengths do not agree.

    `agent_S` the agent's cell before the first and after every step, S = T + 1; `objects_J` cells of the colours, then
    of the walls; `task_K` colours, padding of -1 allowed; `gate_T` the switching gate in [0, 1] at each step, if there
    is one, open from 0.5 up; `horizon` steps allowed, if known.
    """

    env: GridworldPinpad
    agent_S: np.ndarray
    objects_J: np.ndarray
    task_K: np.ndarray
    gate_T: np.ndarray | None = None
    horizon: int | None = None

    def __post_init__(self) -> None:
        objects = self.env.colours + self.env.walls
        if len(self.agent_S) < 1 or len(self.objects_J) != objects:
            raise ValueError(
                f"Episode: agent_S has length {len(self.agent_S)} and objects_J {len(self.objects_J)}, "
                f"expected at least 1 and {objects}"
            )
        if self.gate_T is not None and len(self.gate_T) != self.steps:
            raise ValueError(
                f"Episode: gate_T has length {len(self.gate_T)}, expected {self.steps}, one less than agent_S"
            )

    @property
    def steps(self) -> int:
        """T."""
        return len(self.agent_S) - 1

    @cached_property
    def task(self) -> list[int]:
        """The colours to visit in order."""
        return [int(colour) for colour in self.task_K if colour >= 0]

    @cached_property
    def visited_T(self) -> list[int]:
        """The colour visited at each step, -1 for none."""
        colours = {int(cell): colour for colour, cell in enumerate(self.objects_J[: self.env.colours])}
        return [colours.get(int(to), -1) if to != start else -1 for start, to in pairwise(self.agent_S)]

    @cached_property
    def progress_S(self) -> list[int]:
        """Colours visited in order so far, before the first and after every step."""
        progress = [0]
        for colour in self.visited_T:
            wanted = self.task[progress[-1]] if progress[-1] < len(self.task) else None
            progress.append(progress[-1] + (colour == wanted))
        return progress

    @cached_property
    def switches(self) -> list[int]:
        """Steps at which the gate was open."""
        return [] if self.gate_T is None else [int(step) for step in np.flatnonzero(np.asarray(self.gate_T) >= 0.5)]

    @cached_property
    def legs(self) -> list[tuple[int, int]]:
        """(first, last) of agent_S between one visited colour and the next."""
        ends = [step + 1 for step, colour in enumerate(self.visited_T) if colour >= 0]
        return list(pairwise(dict.fromkeys((0, *ends, self.steps)))) or [(0, 0)]

    @cached_property
    def outcome(self) -> tuple[str, RGB]:
        """What became of the episode, and the ink to write it in."""
        if self.progress_S[-1] == len(self.task):
            return "success", GOOD
        if self.steps and self.visited_T[-1] >= 0 and self.progress_S[-1] == self.progress_S[-2]:
            return f"wrong colour {self.visited_T[-1]}", BAD
        return ("out of time", BAD) if self.steps == self.horizon else ("unfinished", FAINT)


def frame(
    env: GridworldPinpad,
    where: EnvState | tuple[Any, Any],
    *,
    trail: Sequence[Any] | np.ndarray = (),
    switches: Sequence[Any] | np.ndarray = (),
    cell: int = 48,
) -> np.ndarray:
    """Picture (G cell, G cell, 3) in uint8 of a state, or of a pair of agent cell and object cells (J,).

    `trail` cells that led here, oldest first; it fades with age. `switches` cells at which the gate opened. `cell`
    pixels a cell. Raises ValueError for one too small to carry a number.
    """
    if cell < 12:
        raise ValueError(f"frame: cell is {cell}, expected at least 12")
    agent, objects_J = (where.agent, where.objects_J) if isinstance(where, EnvState) else where
    agent, objects = int(agent), [int(place) for place in np.asarray(objects_J)]
    canvas = _Canvas(env.size, cell)
    for place in range(env.size**2):
        canvas.line(place, place, 0.94, FLOOR)
    for place in objects[env.colours :]:
        canvas.line(place, place, 0.94, WALL)
    for colour, place in enumerate(objects[: env.colours]):
        canvas.blob(place, 0.47, _colour(colour), power=6)
    path = [int(place) for place in trail]
    for age, (start, end) in reversed(list(enumerate(reversed(list(pairwise(path)))))):
        canvas.line(start, end, 0.12, _mix(INK, LINE, 0.93**age))
    if path:
        canvas.blob(path[0], 0.13, INK)
        canvas.blob(path[0], 0.07, PAPER)
    for place in switches:
        canvas.blob(int(place), 0.19, PAPER, power=1, shift=(0.29, 0.29))
        canvas.blob(int(place), 0.15, SWITCH, power=1, shift=(0.29, 0.29))
    canvas.blob(agent, 0.37, PAPER)
    canvas.blob(agent, 0.32, INK)
    for colour, place in enumerate(objects[: env.colours]):
        if place != agent:
            # The path may pass under a number but not through it.
            canvas.blob(place, 0.3, _colour(colour))
        canvas.number(place, colour, PAPER if place == agent else _ink_on(_colour(colour)))
    return canvas.picture()


def episode_frames(episode: Episode, *, cell: int = 48) -> list[np.ndarray]:
    """A picture of each of the T + 1 states under a caption: task, progress, step, gate, and at last the outcome."""
    frames, switches = [], set(episode.switches)
    width = max(episode.env.size * cell, 240)
    for step, agent in enumerate(episode.agent_S):
        marks = [episode.agent_S[at] for at in episode.switches if at <= step]
        board = frame(
            episode.env, (agent, episode.objects_J), trail=episode.agent_S[: step + 1], switches=marks, cell=cell
        )
        picture = Image.new("RGB", (width, 62 + board.shape[0]), PAPER)
        picture.paste(Image.fromarray(board), ((width - board.shape[1]) // 2, 62))
        draw = ImageDraw.Draw(picture)
        _task(draw, episode, episode.progress_S[step], (4, 4), width - 8)
        limit = "" if episode.horizon is None else f" / {episode.horizon}"
        draw.text((6, 46), f"step {step}{limit}", INK, _font(14), anchor="lm")
        if step in switches:
            _diamond(draw, (width // 2 - 18, 46), 6)
            draw.text((width // 2 - 8, 46), "switch", INK, _font(14), anchor="lm")
        if step == episode.steps:
            text, ink = episode.outcome
            draw.text((width - 6, 46), text, ink, _font(14), anchor="rm")
        frames.append(np.asarray(picture))
    return frames


def episode_gif(path: str | Path, frames: Sequence[np.ndarray], *, milliseconds: int = 160, hold: int = 1600) -> None:
    """Write frames as an endless animation: `milliseconds` each and `hold` for the last."""
    if not len(frames):
        raise ValueError("episode_gif: frames is empty, expected at least one")
    first, *rest = _share_palette(frames)
    durations = [milliseconds] * len(rest) + [hold]
    first.save(path, format="GIF", save_all=True, append_images=rest, duration=durations, loop=0)


def episode_picture(episode: Episode, *, columns: int = 6, cell: int = 24) -> np.ndarray:
    """The whole episode as one picture: the task, a board for the path from each visited colour to the next, and over
    time the pursued colour and the gate."""
    board, gap, top = episode.env.size * cell, 12, 64
    columns = min(columns, len(episode.legs))
    rows = -(-len(episode.legs) // columns)
    width = max(columns * (board + gap) + gap, 420)
    bottom = top + rows * (board + 24 + gap)
    picture = Image.new("RGB", (width, bottom + (48 if episode.gate_T is None else 84)), PAPER)
    draw = ImageDraw.Draw(picture)
    _task(draw, episode, episode.progress_S[-1], (gap, 8), width - 2 * gap)
    text, ink = episode.outcome
    draw.text((gap, 50), f"{text}, {_steps(episode.steps)}", ink, _font(14), anchor="lm")
    for index, (first, last) in enumerate(episode.legs):
        x = gap + index % columns * (board + gap)
        y = top + index // columns * (board + 24 + gap)
        marks = [episode.agent_S[step] for step in episode.switches if first <= step < last]
        trail = episode.agent_S[first : last + 1]
        drawn = frame(episode.env, (trail[-1], episode.objects_J), trail=trail, switches=marks, cell=cell)
        draw.text((x, y + 12), _leg(episode, first, last), INK, _font(12), anchor="lm")
        picture.paste(Image.fromarray(drawn), (x, y + 24))
    _timeline(draw, episode, (gap, bottom + 8), width - 2 * gap)
    return np.asarray(picture)


def episode_png(path: str | Path, episode: Episode, *, columns: int = 6, cell: int = 24) -> None:
    """Write `episode_picture`."""
    Image.fromarray(episode_picture(episode, columns=columns, cell=cell)).save(path, format="PNG")


class _Canvas:
    """A board under construction; lengths in cells, places as cell numbers."""

    def __init__(self, size: int, cell: int):
        self.size, self.unit = size, cell * _FINE
        self.pixels = np.full((size * self.unit, size * self.unit, 3), LINE, np.uint8)
        self.steps = (np.arange(size * self.unit) + 0.5) / self.unit

    def box(self, low: tuple[float, float], high: tuple[float, float]) -> tuple[slice, slice]:
        """The pixels between two corners (row, column)."""
        y, x = (
            slice(max(round(a * self.unit), 0), max(round(b * self.unit), 0)) for a, b in zip(low, high, strict=True)
        )
        return y, x

    def centre(self, place: int) -> tuple[float, float]:
        """(row, column) of the middle of a cell."""
        return place // self.size + 0.5, place % self.size + 0.5

    def blob(
        self, place: int, radius: float, colour: RGB, power: float = 2, shift: tuple[float, float] = (0, 0)
    ) -> None:
        """Ball of a p-norm: a diamond for p = 1, a disc for 2, a square with round corners above."""
        y, x = (a + b for a, b in zip(self.centre(place), shift, strict=True))
        rows, columns = self.box((y - radius, x - radius), (y + radius, x + radius))
        away = (
            np.abs(self.steps[rows, None] - y) / radius,
            np.abs(self.steps[None, columns] - x) / radius,
        )
        self.pixels[rows, columns][away[0] ** power + away[1] ** power <= 1] = colour

    def line(self, start: int, end: int, width: float, colour: RGB) -> None:
        """From the middle of one cell to that of another in its row or column; a square where they are one."""
        (y1, x1), (y2, x2), w = self.centre(start), self.centre(end), width / 2
        self.pixels[self.box((min(y1, y2) - w, min(x1, x2) - w), (max(y1, y2) + w, max(x1, x2) + w))] = colour

    def number(self, place: int, value: int, colour: RGB) -> None:
        """A number in the middle of a cell, narrower dots for more digits."""
        y, x = self.centre(place)
        text = str(value)
        dot = 0.1 if len(text) == 1 else 0.075
        left = x - dot * (4 * len(text) - 1) / 2
        for index, digit in enumerate(text):
            for row, code in enumerate(_DIGITS[int(digit)]):
                for column in range(3):
                    if int(code) >> (2 - column) & 1:
                        low = y + (row - 2.5) * dot, left + (4 * index + column) * dot
                        self.pixels[self.box(low, (low[0] + dot, low[1] + dot))] = colour

    def picture(self) -> np.ndarray:
        """The board at its final size."""
        side = len(self.pixels) // _FINE
        fine = self.pixels.reshape(side, _FINE, side, _FINE, 3)
        total = sum(fine[:, row, :, column].astype(np.uint16) for row in range(_FINE) for column in range(_FINE))
        return np.asarray(total // _FINE**2, np.uint8)


def _colour(index: int) -> RGB:
    return PALETTE[index % len(PALETTE)]


def _mix(ink: RGB, paper: RGB, share: float) -> RGB:
    red, green, blue = (round(share * a + (1 - share) * b) for a, b in zip(ink, paper, strict=True))
    return red, green, blue


def _ink_on(colour: RGB) -> RGB:
    return INK if np.dot(colour, (0.299, 0.587, 0.114)) > 140 else PAPER


def _font(size: int) -> Any:
    return ImageFont.load_default(size)


def _steps(count: int) -> str:
    return f"{count} step" if count == 1 else f"{count} steps"


def _target(episode: Episode, step: int) -> int:
    """The colour pursued at a step."""
    return episode.task[min(episode.progress_S[step], len(episode.task) - 1)]


def _leg(episode: Episode, first: int, last: int) -> str:
    """What the path from one visited colour to the next was for, and whether it led there."""
    target, met = _target(episode, first), episode.visited_T[last - 1] if last else -1
    if met == target:
        return f"to {target}: {_steps(last - first)}"
    return f"to {target}: met {met}" if met >= 0 else f"to {target}: not in {_steps(last - first)}"


def _share_palette(frames: Sequence[np.ndarray]) -> list[Image.Image]:
    """Frames with one palette of their 256 commonest colours, exact, and the nearest of these for any other colour.

    Pillow's own quantisation averages colours: white paper turns grey and flat areas flicker between frames.
    """
    codes = [
        np.unique(each.astype(np.int32) @ (65536, 256, 1), return_inverse=True, return_counts=True) for each in frames
    ]
    counts: dict[int, int] = {}
    for values, _, many in codes:
        for value, count in zip(values.tolist(), many.tolist(), strict=True):
            counts[value] = counts.get(value, 0) + count
    palette = np.array(sorted(counts, key=lambda value: -counts[value])[:256])
    palette_rgb = palette[:, None] >> (16, 8, 0) & 255
    images = []
    for values, where, _ in codes:
        away = ((values[:, None] >> (16, 8, 0) & 255)[:, None] - palette_rgb[None]) ** 2
        image = Image.fromarray(away.sum(-1).argmin(-1).astype(np.uint8)[where].reshape(frames[0].shape[:2]))
        image.putpalette(palette_rgb.astype(np.uint8).tobytes())
        images.append(image)
    return images


def _diamond(draw: ImageDraw.ImageDraw, at: tuple[int, int], radius: int) -> None:
    x, y = at
    draw.polygon([(x - radius, y), (x, y - radius), (x + radius, y), (x, y + radius)], fill=SWITCH)


def _task(draw: ImageDraw.ImageDraw, episode: Episode, progress: int, at: tuple[int, int], width: int) -> None:
    """The task as numbered squares: visited ones full, the pursued one framed, the rest pale."""
    side = min(28, width // len(episode.task))
    for index, colour in enumerate(episode.task):
        x, y = at[0] + index * side, at[1]
        fill = _colour(colour) if index <= progress else _mix(_colour(colour), PAPER, 0.3)
        frame_ink = INK if index == progress else PAPER
        draw.rectangle((x, y, x + side - 2, y + side - 2), fill, frame_ink, 2)
        ink = _ink_on(fill) if index <= progress else FAINT
        draw.text((x + side / 2 - 1, y + side / 2 - 1), str(colour), ink, _font(side // 2), anchor="mm")


def _timeline(draw: ImageDraw.ImageDraw, episode: Episode, at: tuple[int, int], width: int) -> None:
    """The pursued colour at each step, and under it how far the gate was open."""
    x, y = at
    edges = [x + round(step * width / max(episode.steps, 1)) for step in range(episode.steps + 1)]
    for first, last in episode.legs:
        target = _target(episode, first)
        draw.rectangle((edges[first], y, max(edges[first], edges[last] - 1), y + 20), _colour(target))
        if edges[last] - edges[first] > 12:
            draw.text((edges[first] + 4, y + 10), str(target), _ink_on(_colour(target)), _font(12), anchor="lm")
    below = y + 30 if episode.gate_T is None else y + 66
    label = (
        "pursued colour, step by step" if episode.gate_T is None else "gate; above it the pursued colour, step by step"
    )
    draw.text((x, below), label, FAINT, _font(11), anchor="lm")
    for step, gate in enumerate(() if episode.gate_T is None else episode.gate_T):
        ink = SWITCH if gate >= 0.5 else FAINT
        right = max(edges[step], edges[step + 1] - 2)
        draw.rectangle((edges[step], y + 56 - round(28 * float(gate)), right, y + 56), ink)
