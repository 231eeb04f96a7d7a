"""A Brax episode as a web page that plays offline, and as pictures.

The page carries the shapes of the model, the pose of every link at every frame, and a small WebGL program that draws
them; it loads nothing. Drag to orbit, scroll to zoom, space to play, arrow keys to step; `page.html#30` opens paused at
frame 30. Poses are rounded to 0.1 mm and to 1e-4 of a unit quaternion.

`frames` and `episode_gif` use MuJoCo's renderer, which needs OpenGL; without a screen, set MUJOCO_GL=egl before Python
starts.
"""

import html
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
from PIL import Image

from rl.envs.brax_env import BraxEnv, BraxState

_SHAPES = {0: "plane", 2: "sphere", 3: "capsule", 4: "ellipsoid", 5: "cylinder", 6: "box"}  # MuJoCo's numbers


def episode_html(env: BraxEnv, states: BraxState, path: str | Path, reward_T: Any = None) -> Path:
    """Write the page of an episode. `states` is stacked (T, ...), as a scan collects them; with the rewards (T,) of the
    steps that led to them the page shows the return so far. Returns the path.

    Raises ValueError for states that are not of a single episode, for another number of rewards, and for a model with
    shapes that the page cannot draw.
    """
    scene = trajectory(env, states)
    if reward_T is not None:
        if np.shape(reward_T) != (len(scene["poses"]),):
            raise ValueError(
                f"episode_html: reward_T has shape {np.shape(reward_T)}, expected ({len(scene['poses'])},)"
            )
        scene["return"] = np.cumsum(np.asarray(reward_T, np.float64)).round(3).tolist()
    title = f"{env.name} ({env.backend})"
    # A closing tag inside a string would end the script.
    text = json.dumps(scene, separators=(",", ":"), allow_nan=False).replace("</", "<\\/")
    page = _PAGE.replace("%TITLE%", html.escape(title)).replace("%TRAJECTORY%", text)
    path = Path(path)
    path.write_text(page, encoding="utf-8")
    return path


def trajectory(env: BraxEnv, states: BraxState) -> dict[str, Any]:
    """What the page shows, as plain lists: `seconds` a frame; `geoms` with their `shape`, `size`, `colour`, `link` (-1
    the world) and pose in it; `poses` (T, links, 7), position then quaternion (w, x, y, z); `radius` of the robot."""
    _check_single(states, "episode_html")
    model = env.brax.sys.mj_model
    x = jax.tree.map(np.asarray, states.brax.pipeline_state.x)
    poses_TL7 = np.concatenate([x.pos, x.rot], axis=-1)
    if not np.isfinite(poses_TL7).all():
        first = int(np.argmin(np.isfinite(poses_TL7).all((1, 2))))
        raise ValueError(
            f"episode_html: the pose of frame {first} is not finite, expected a simulation that did not fail"
        )
    geoms = []
    for g in range(model.ngeom):
        kind = int(model.geom_type[g])
        if kind not in _SHAPES:
            raise ValueError(f"episode_html: {env.name} has a shape of MuJoCo's type {kind}, expected one of {_SHAPES}")
        if model.geom_rgba[g, 3] == 0:
            continue
        pose = np.concatenate([model.geom_pos[g], model.geom_quat[g]])
        geoms.append({
            "shape": _SHAPES[kind],
            "size": model.geom_size[g].round(5).tolist(),
            "colour": model.geom_rgba[g, :3].astype(float).round(3).tolist(),
            "link": int(model.geom_bodyid[g]) - 1,
            "pose": pose.round(5).tolist(),
        })  # fmt: skip
    # No part is further from the first link than its own link is, plus its own reach.
    away_L = np.linalg.norm(x.pos[0] - x.pos[0, :1], axis=-1)
    reach = [
        away_L[geom["link"]] + np.linalg.norm(geom["pose"][:3]) + max(geom["size"])
        for geom in geoms
        if geom["link"] >= 0
    ]
    return {
        "seconds": round(float(env.brax.dt) * env.action_repeat, 6),
        "radius": round(float(max(reach)), 3),
        "geoms": geoms,
        "poses": poses_TL7.astype(np.float64).round(4).tolist(),
    }


def frames(
    env: BraxEnv, states: BraxState, height: int = 240, width: int = 320, camera: str | None = None
) -> np.ndarray:
    """Pictures (T, height, width, 3), uint8, of states stacked (T, ...).

    `camera` is one of the model's; by default the one that tracks the robot, or a free one where the model has none.
    Raises ValueError for states that are not of a single episode, RuntimeError where there is no OpenGL.
    """
    _check_single(states, "frames")
    import mujoco

    model = env.brax.sys.mj_model
    if camera is None and any(model.camera(index).name == "track" for index in range(model.ncam)):
        camera = "track"
    pipeline = states.brax.pipeline_state
    q_TQ, qd_TV = np.asarray(pipeline.q, np.float64), np.asarray(pipeline.qd, np.float64)
    try:
        renderer = mujoco.Renderer(model, height=height, width=width)
    except Exception as error:  # every backend fails in its own way
        raise RuntimeError(
            f"frames: MuJoCo's renderer did not start ({error}); it needs OpenGL: set MUJOCO_GL=egl or "
            "MUJOCO_GL=osmesa before Python starts, or use episode_html, which needs none"
        ) from error
    with renderer:
        data, pictures = mujoco.MjData(model), []  # pyright: ignore[reportAttributeAccessIssue]  # compiled
        for q, qd in zip(q_TQ, qd_TV, strict=True):
            data.qpos, data.qvel = q, qd
            mujoco.mj_forward(model, data)  # pyright: ignore[reportAttributeAccessIssue]
            renderer.update_scene(data, camera=-1 if camera is None else camera)
            pictures.append(renderer.render())
    return np.stack(pictures)


def episode_gif(env: BraxEnv, states: BraxState, path: str | Path, **options: Any) -> Path:
    """Write an episode as a GIF that plays in real time; `options` are those of `frames`. Returns the path.

    A GIF counts in hundredths of a second and browsers slow down below two: faster episodes lose frames.
    """
    seconds = float(env.brax.dt) * env.action_repeat
    every = max(1, round(0.03 / seconds))
    pictures = [
        Image.fromarray(picture) for picture in frames(env, jax.tree.map(lambda x: x[::every], states), **options)
    ]
    path = Path(path)
    duration = max(20, 10 * round(100 * seconds * every))
    pictures[0].save(path, format="gif", save_all=True, append_images=pictures[1:], duration=duration, loop=0)
    return path


def _check_single(states: BraxState, caller: str) -> None:
    shape = np.shape(states.brax.pipeline_state.q)
    if len(shape) != 2 or shape[0] == 0:
        raise ValueError(
            f"{caller}: the states have joint positions of shape {shape}, expected (T, Q) of a single episode, T >= 1; "
            "of a batch (T, E, ...) take one: jax.tree.map(lambda x: x[:, 0], states)"
        )


_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>%TITLE%</title>
<style>
html, body { margin: 0; height: 100%; background: #e9edf1; font: 14px system-ui, sans-serif; color: #222; }
body { display: flex; flex-direction: column; }
canvas { flex: 1; min-height: 0; width: 100%; touch-action: none; cursor: grab; }
footer { display: flex; gap: 12px; align-items: center; padding: 8px 14px; background: #fff; }
footer input { flex: 1; }
button, select { font: inherit; min-width: 4.5em; }
output { font-variant-numeric: tabular-nums; white-space: pre; }
</style>
</head>
<body>
<canvas></canvas>
<footer>
<strong>%TITLE%</strong>
<button id="play">pause</button>
<input id="scrub" type="range" min="0" value="0" aria-label="frame">
<select id="speed" aria-label="speed">
<option value="0.25">0.25x</option><option value="0.5">0.5x</option>
<option value="1" selected>1x</option><option value="2">2x</option><option value="4">4x</option>
</select>
<output id="text"></output>
</footer>
<script type="application/json" id="trajectory">%TRAJECTORY%</script>
<script>
"use strict";
const at = id => document.getElementById(id);
const scene = JSON.parse(at("trajectory").textContent), poses = scene.poses, T = poses.length;
const canvas = document.querySelector("canvas");
const gl = canvas.getContext("webgl", {alpha: false, antialias: true, stencil: true});
if (!gl) throw at("text").textContent = "This browser has no WebGL.";

// Vectors, and matrices of four columns.
const add = (a, b, s = 1) => a.map((x, i) => x + s * b[i]);
const cross = (a, b) => [a[1]*b[2] - a[2]*b[1], a[2]*b[0] - a[0]*b[2], a[0]*b[1] - a[1]*b[0]];
const dot = (a, b) => a[0]*b[0] + a[1]*b[1] + a[2]*b[2];
const unit = a => a.map(x => x / Math.hypot(...a));
const rotate = (q, v) => {
  const t = cross(q.slice(1), v).map(x => 2*x);
  return add(add(v, t, q[0]), cross(q.slice(1), t));
};
const product = (p, q) => [p[0]*q[0] - dot(p.slice(1), q.slice(1)),
  ...add(add(cross(p.slice(1), q.slice(1)), q.slice(1), p[0]), p.slice(1), q[0])];
const compose = (a, b) =>
  [...add(a.slice(0, 3), rotate(a.slice(3), b.slice(0, 3))), ...product(a.slice(3), b.slice(3))];
const matrix = p => {
  const q = unit(p.slice(3)), [x, y, z] = [[1,0,0], [0,1,0], [0,0,1]].map(axis => rotate(q, axis));
  return [...x, 0, ...y, 0, ...z, 0, ...p.slice(0, 3), 1];
};

// Shapes of unit size: corners with their normals. A capsule is a cylinder and two spheres.
function surface(point, normal, rows, columns) {
  const out = [];
  for (let i = 0; i < rows; i++) for (let j = 0; j < columns; j++)
    for (const [a, b] of [[0,0],[1,0],[1,1],[0,0],[1,1],[0,1]]) {
      const u = (i + a) / rows, v = 2 * Math.PI * (j + b) / columns;
      out.push(...point(u, v), ...normal(u, v));
    }
  return out;
}
const globe = (u, v) => [Math.sin(Math.PI*u)*Math.cos(v), Math.sin(Math.PI*u)*Math.sin(v), Math.cos(Math.PI*u)];
const square = [[-1,-1],[1,-1],[1,1],[-1,-1],[1,1],[-1,1]];
const lid = z => surface((u, v) => [u*Math.cos(v), u*Math.sin(v), z], () => [0, 0, z], 1, 32);
const side = (axis, sign) => square.flatMap(([a, b]) => {
  const p = [a, b]; p.splice(axis, 0, sign);
  return [...p, ...[0, 1, 2].map(i => i == axis ? sign : 0)]; });
const meshes = {
  sphere: surface(globe, globe, 20, 32),
  tube: surface((u, v) => [Math.cos(v), Math.sin(v), 2*u - 1], (u, v) => [Math.cos(v), Math.sin(v), 0], 1, 32),
  lids: [...lid(1), ...lid(-1)],
  box: [0, 1, 2].flatMap(axis => [...side(axis, 1), ...side(axis, -1)]),
  plane: square.flatMap(([a, b]) => [a, b, 0, 0, 0, 1]),
};
const range = {}, corners = [];
for (const name in meshes) {
  range[name] = [corners.length / 6, meshes[name].length / 6];
  for (const x of meshes[name]) corners.push(x);
}

const program = gl.createProgram();
for (const [kind, text] of [[gl.VERTEX_SHADER, `
  attribute vec3 corner, outward; uniform mat4 model, view; uniform vec3 size, light; uniform float flat_, floor_;
  varying vec3 place, normal;
  void main() {
    place = (model * vec4(corner * size, 1.0)).xyz;
    normal = (model * vec4(outward / size, 0.0)).xyz;
    if (flat_ > 0.5) { place -= light * (place.z - floor_) / light.z; place.z += 0.002; }
    gl_Position = view * vec4(place, 1.0);
  }`], [gl.FRAGMENT_SHADER, `
  precision highp float; uniform vec3 colour, light, eye, fog; uniform float flat_, checker, far;
  varying vec3 place, normal;
  void main() {
    vec3 n = normalize(normal), toEye = normalize(eye - place);
    float haze = smoothstep(0.35 * far, far, distance(eye, place));
    if (flat_ > 0.5) { gl_FragColor = vec4(0.0, 0.0, 0.0, 0.3 * (1.0 - haze)); return; }
    float shine = pow(max(dot(n, normalize(light + toEye)), 0.0), 24.0);
    vec3 c = colour * (0.55 + 0.6 * max(dot(n, light), 0.0)) + 0.12 * shine;
    if (checker > 0.0) {
      vec2 cell = floor(place.xy / checker);
      c = mix(vec3(0.80, 0.83, 0.86), vec3(0.70, 0.74, 0.78), mod(cell.x + cell.y, 2.0));
    }
    gl_FragColor = vec4(mix(c, fog, haze), 1.0);
  }`]]) {
  const shader = gl.createShader(kind);
  gl.shaderSource(shader, text); gl.compileShader(shader); gl.attachShader(program, shader);
}
gl.linkProgram(program);
if (!gl.getProgramParameter(program, gl.LINK_STATUS)) throw at("text").textContent = gl.getProgramInfoLog(program);
gl.useProgram(program);
gl.bindBuffer(gl.ARRAY_BUFFER, gl.createBuffer());
gl.bufferData(gl.ARRAY_BUFFER, new Float32Array(corners), gl.STATIC_DRAW);
["corner", "outward"].forEach((name, i) => {
  const place = gl.getAttribLocation(program, name);
  gl.enableVertexAttribArray(place); gl.vertexAttribPointer(place, 3, gl.FLOAT, false, 24, 12 * i);
});
const uniforms = {};
function set(name, ...values) {
  const place = uniforms[name] ??= gl.getUniformLocation(program, name);
  if (values.length == 16) gl.uniformMatrix4fv(place, false, values);
  else gl[`uniform${values.length}f`](place, ...values);
}

const light = unit([-0.4, -0.5, 1]), fog = [0.914, 0.929, 0.945], far = 14 * scene.radius + 10;
const planes = scene.geoms.filter(g => g.shape == "plane"), solids = scene.geoms.filter(g => g.shape != "plane");
// The camera looks at the first link, without its quick movements.
const target = poses.map((_, t) => {
  const near = poses.slice(Math.max(0, t - 12), t + 13);
  return [0, 1, 2].map(i => near.reduce((sum, pose) => sum + pose[0][i], 0) / near.length);
});
let yaw = -0.9, pitch = 0.35, away = Math.max(0.5, 3 * scene.radius), clock = 0, playing = true, last = null;

function parts(geom) {
  const [a, b, c] = geom.size;
  if (geom.shape == "sphere") return [["sphere", [a, a, a], 0]];
  if (geom.shape == "ellipsoid") return [["sphere", [a, b, c], 0]];
  if (geom.shape == "box") return [["box", [a, b, c], 0]];
  if (geom.shape == "cylinder") return [["tube", [a, a, b], 0], ["lids", [a, a, b], 0]];
  return [["tube", [a, a, b], 0], ["sphere", [a, a, a], b], ["sphere", [a, a, a], -b]];
}
function paint(geom, frame) {
  const pose = geom.link < 0 ? geom.pose : compose(frame[geom.link], geom.pose);
  set("colour", ...geom.colour);
  for (const [mesh, size, shift] of parts(geom)) {
    set("model", ...matrix(compose(pose, [0, 0, shift, 1, 0, 0, 0]))); set("size", ...size);
    gl.drawArrays(gl.TRIANGLES, ...range[mesh]);
  }
}
function draw() {
  const t = Math.min(T - 1, Math.floor(clock / scene.seconds)), frame = poses[t], sharp = window.devicePixelRatio || 1;
  const width = Math.round(canvas.clientWidth * sharp), height = Math.round(canvas.clientHeight * sharp);
  if (canvas.width != width || canvas.height != height) { canvas.width = width; canvas.height = height; }
  gl.viewport(0, 0, width, height);
  gl.clearColor(...fog, 1);
  gl.clear(gl.COLOR_BUFFER_BIT | gl.DEPTH_BUFFER_BIT | gl.STENCIL_BUFFER_BIT);
  const back = [Math.cos(pitch)*Math.cos(yaw), Math.cos(pitch)*Math.sin(yaw), Math.sin(pitch)];
  const eye = add(target[t], back, away), right = unit(cross([0, 0, 1], back)), up = cross(back, right);
  const near = 0.02 * away, f = 2.4, reach = 4 * far, wide = Math.max(1, height / width);
  // Rows of the camera's frame, then the perspective: x and y over depth, depth from near to reach.
  const rows = [right.map(x => f/wide * height/width * x), up.map(x => f/wide * x), back];
  const moved = rows.map(row => -dot(row, eye));
  const k = (reach + near) / (near - reach), m = 2 * reach * near / (near - reach);
  set("view", ...[0, 1, 2].flatMap(i => [rows[0][i], rows[1][i], k * rows[2][i], -rows[2][i]]),
    moved[0], moved[1], k * moved[2] + m, -moved[2]);
  set("light", ...light); set("eye", ...eye); set("fog", ...fog); set("far", far); set("flat_", 0);
  gl.enable(gl.DEPTH_TEST);
  set("checker", Math.max(0.1, Math.round(4 * scene.radius) / 4));
  for (const plane of planes) {
    set("model", ...matrix(plane.pose)); set("size", plane.size[0] || 100, plane.size[1] || 100, 1);
    gl.drawArrays(gl.TRIANGLES, ...range.plane);
    // Shadows, each place darkened once.
    set("flat_", 1); set("floor_", plane.pose[2]);
    gl.enable(gl.BLEND); gl.blendFunc(gl.SRC_ALPHA, gl.ONE_MINUS_SRC_ALPHA); gl.depthMask(false);
    gl.enable(gl.STENCIL_TEST); gl.stencilFunc(gl.EQUAL, 0, 255); gl.stencilOp(gl.KEEP, gl.KEEP, gl.INCR);
    for (const geom of solids) paint(geom, frame);
    gl.disable(gl.STENCIL_TEST); gl.disable(gl.BLEND); gl.depthMask(true);
    set("flat_", 0);
  }
  set("checker", 0);
  for (const geom of solids) paint(geom, frame);
  at("scrub").value = t;
  const so_far = scene.return ? `  return ${scene.return[t].toFixed(1)}` : "";
  at("text").textContent = `frame ${t} of ${T - 1}  ${(t * scene.seconds).toFixed(2)} s${so_far}`;
}
function loop(now) {
  if (playing && last !== null) clock += (now - last) / 1000 * at("speed").value;
  if (clock >= T * scene.seconds) clock = playing ? 0 : (T - 0.5) * scene.seconds;
  last = now; draw(); requestAnimationFrame(loop);
}
function play(on) { playing = on; at("play").textContent = on ? "pause" : "play"; }
function show(t) { play(false); clock = (Math.max(0, Math.min(T - 1, t)) + 0.5) * scene.seconds; }
at("scrub").max = T - 1;
at("scrub").oninput = event => show(+event.target.value);
at("play").onclick = () => play(!playing);
document.onkeydown = event => {
  if (event.key == " ") play(!playing);
  else if (event.key == "ArrowRight") show(+at("scrub").value + 1);
  else if (event.key == "ArrowLeft") show(+at("scrub").value - 1);
  else return;
  event.preventDefault();
};
canvas.onpointerdown = event => canvas.setPointerCapture(event.pointerId);
canvas.onpointermove = event => {
  if (!event.buttons) return;
  yaw -= 0.008 * event.movementX;
  pitch = Math.max(-0.1, Math.min(1.5, pitch + 0.008 * event.movementY));
};
canvas.addEventListener("wheel", event => {
  away *= Math.exp(0.001 * event.deltaY);
  event.preventDefault();
}, {passive: false});
if (/^#[0-9]+$/.test(location.hash)) show(+location.hash.slice(1));
requestAnimationFrame(loop);
</script>
</body>
</html>
"""
