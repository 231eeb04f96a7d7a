"""The four ops as their common tests see them: cases with the axes of every argument, how they are drawn, and the
definition as a loop over steps in float64."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np

from kernels import (
    DeltaRuleBlocks,
    LinearAttentionBlocks,
    LinearRecurrenceBlocks,
    SelectiveScanBlocks,
    delta_rule,
    delta_rule_step,
    linear_attention,
    linear_attention_step,
    linear_recurrence,
    linear_recurrence_step,
    selective_scan,
    selective_scan_step,
)

Arguments = dict[str, Any]


@dataclass(frozen=True, eq=False, repr=False)
class Op:
    """One op.

    `cases` name the axes of every argument, and options. All ops have "plain", with what can't be left out, "full" with
    what a run may have and "reverse", which adds boundaries of segments and runs backwards. Batch and length of every
    argument lead, in this order, and only they are called B and L.
    """

    name: str
    run: Callable[..., Any]
    step: Callable[..., Any]
    cases: dict[str, tuple[dict[str, str], dict[str, Any]]]
    sizes: dict[str, int]  # small, prime where they can be, pairwise different
    adjust: Callable[[Arguments, dict[str, Any]], Arguments]  # from normal numbers to those of the right kind
    loop: Callable[[Arguments, dict[str, Any]], tuple[Any, Any]]
    decay: Callable[[Arguments, Any], Arguments]  # log-decays that broadcast to (B, L, a channel)
    mix: Callable[[Arguments, Any], Arguments]  # log-decays that a function draws from a shape
    writes: tuple[str, ...]  # without these no step adds anything to a state
    decay_case: str  # takes decays as they are
    decay_argument: str
    grouped_case: str | None  # shares some arguments among heads or channels
    shared: tuple[str, ...]
    blocks: dict[str, Any]
    default_blocks: Any
    tolerance: float  # of float32, as a share of the largest entry
    on_gpu: tuple[tuple[str, int], ...]  # cases and lengths with chunks that are whole, begun, and follow each other
    gpu_sizes: dict[str, int]
    lowered: dict[str, tuple[tuple[str, dict[str, int], str], ...]]  # by platform: case, sizes and dtype
    large: dict[str, int]  # sizes for tests of memory

    def __repr__(self) -> str:
        return self.name

    @property
    def state(self) -> str:
        return next(name for name in self.cases["full"][0] if name.startswith("initial_state"))

    def runs(self, implementation: str, case: str) -> bool:
        if implementation == "scan":
            return "scan" in self.blocks
        return case != "complex" or implementation in ("reference", "chunked")


def _axes(*names: str) -> dict[str, str]:
    return {name: name.rsplit("_", 1)[1] for name in names}


def _steps(ids: Any, reverse: bool):
    """Steps in running order, each with the rows of the batch whose state is cleared before."""
    L = ids.shape[1]
    order = range(L)[:: -1 if reverse else 1]
    before = None
    for t in order:
        yield t, np.zeros(ids.shape[0], bool) if before is None else ids[:, t] != ids[:, before]
        before = t


def _wide(arguments: Arguments) -> Arguments:
    kinds = {"f": np.float64, "c": np.complex128}
    arrays = {name: np.asarray(each) for name, each in arguments.items()}
    return {name: each.astype(kinds.get(each.dtype.kind, np.int64)) for name, each in arrays.items()}


def _recurrence_loop(arguments: Arguments, options: dict[str, Any]):
    given = _wide(arguments)
    a, x = given["a_BLN"], given["x_BLN"]
    h = given.get("initial_state", np.zeros(x[:, 0].shape))
    states = np.empty(x.shape, np.result_type(a, x, h))
    for t, cleared in _steps(given.get("segment_ids", np.zeros(x.shape[:2])), options.get("reverse", False)):
        h = a[:, t] * np.where(cleared[:, None], 0, h) + x[:, t]
        states[:, t] = h
    return states, h


def _attention_loop(arguments: Arguments, options: dict[str, Any]):
    given = _wide(arguments)
    q, k, v, g = given["q_BLHK"], given["k_BLGK"], given["v_BLGV"], given.get("log_decay")
    B, L, H, K = q.shape
    share = H // k.shape[2]
    S = given.get("initial_state_BHKV", np.zeros((B, H, K, v.shape[3]))).copy()
    y = np.zeros((B, L, H, v.shape[3]))
    for t, cleared in _steps(given.get("segment_ids", np.zeros((B, L))), options.get("reverse", False)):
        S[cleared] = 0
        for h in range(H):
            if g is not None:
                now = np.asarray(g[h] if g.ndim == 1 else g[:, t, h])
                S[:, h] *= np.exp(now.reshape(*now.shape, *[1] * (3 - now.ndim)))
            S[:, h] += k[:, t, h // share, :, None] * v[:, t, h // share, None]
            y[:, t, h] = options.get("scale", 1) * np.einsum("bk,bkv->bv", q[:, t, h], S[:, h])
    return y, S


def _delta_loop(arguments: Arguments, options: dict[str, Any]):
    """With the transition matrix written out."""
    given = _wide(arguments)
    q, k, v, beta = (given[name] for name in ("q_BLHK", "k_BLHK", "v_BLHV", "beta_BLH"))
    B, L, H, K = k.shape
    share = q.shape[2] // H
    decay = np.exp(given.get("log_decay_BLH", np.zeros(beta.shape)))
    S = given.get("initial_state_BHKV", np.zeros((B, H, K, v.shape[3]))).copy()
    o = np.zeros((*q.shape[:3], v.shape[3]))
    for t, cleared in _steps(given.get("segment_ids", np.zeros((B, L))), options.get("reverse", False)):
        S[cleared] = 0
        for b, h in np.ndindex(B, H):
            key, share_written = k[b, t, h], beta[b, t, h]
            turn = decay[b, t, h] * (np.eye(K) - share_written * np.outer(key, key))
            S[b, h] = turn @ S[b, h] + share_written * np.outer(key, v[b, t, h])
            queries = slice(h * share, (h + 1) * share)
            o[b, t, queries] = options.get("scale", 1) * q[b, t, queries] @ S[b, h]
    return o, S


def _scan_loop(arguments: Arguments, options: dict[str, Any]):
    given = _wide(arguments)
    u, delta, A, maps_in, maps_out = (given[name] for name in ("u_BLD", "delta_BLD", "A_DN", "B_BLN", "C_BLN"))
    B, L, D = u.shape
    if maps_in.ndim == 3:
        maps_in, maps_out = maps_in[:, :, None], maps_out[:, :, None]
    delta = delta + given.get("delta_bias_D", np.zeros(D))
    if options.get("delta_softplus"):
        delta = np.logaddexp(0, delta)
    h = given.get("initial_state_BDN", np.zeros((B, *A.shape))).copy()
    y = np.zeros(u.shape)
    for t, cleared in _steps(given.get("segment_ids", np.zeros((B, L))), options.get("reverse", False)):
        h[cleared] = 0
        for d in range(D):
            g = d * maps_in.shape[2] // D
            step = delta[:, t, d, None]
            h[:, d] = np.exp(step * A[d]) * h[:, d] + step * u[:, t, d, None] * maps_in[:, t, g]
            y[:, t, d] = (maps_out[:, t, g] * h[:, d]).sum(-1)
    y = y + given.get("D_D", np.zeros(D)) * u
    if "z_BLD" in given:
        y = y * given["z_BLD"] / (1 + np.exp(-given["z_BLD"]))
    return y, h


def _recurrence_adjust(arguments: Arguments, options: dict[str, Any]) -> Arguments:
    return arguments | {"a_BLN": (0.7 * arguments["a_BLN"]).astype(arguments["a_BLN"].dtype)}


def _attention_adjust(arguments: Arguments, options: dict[str, Any]) -> Arguments:
    return {name: -0.5 * each**2 if name == "log_decay" else each for name, each in arguments.items()}


def _delta_adjust(arguments: Arguments, options: dict[str, Any]) -> Arguments:
    """Keys of unit length, and shares that turn the state as far as a reflection."""
    length = np.linalg.norm(arguments["k_BLHK"], axis=-1, keepdims=True)
    beta = (1 + np.tanh(arguments["beta_BLH"])).astype(np.float32)
    arguments = arguments | {"k_BLHK": arguments["k_BLHK"] / length, "beta_BLH": beta}
    return {name: -np.abs(each) if name == "log_decay_BLH" else each for name, each in arguments.items()}


def _scan_adjust(arguments: Arguments, options: dict[str, Any]) -> Arguments:
    arguments = arguments | {"A_DN": -np.exp(arguments["A_DN"])}
    return arguments if options.get("delta_softplus") else arguments | {"delta_BLD": np.abs(arguments["delta_BLD"])}


def _fill(name: str, write: Callable[[Any], Any]) -> Callable[[Arguments, Any], Arguments]:
    def fill(arguments: Arguments, given: Any) -> Arguments:
        return arguments | {name: write((arguments[name], given)).astype(np.float32)}

    return fill


def _broadcast(pair):
    """Log-decays (B, L, 1) to the shape of an argument."""
    array, g = pair
    return np.broadcast_to(g.reshape(*g.shape[:2], *[1] * (array.ndim - 2)), array.shape)


def _scan_decay(arguments: Arguments, g: Any) -> Arguments:
    delta = np.broadcast_to(-g, arguments["delta_BLD"].shape).astype(np.float32)
    return arguments | {"A_DN": -np.ones_like(arguments["A_DN"]), "delta_BLD": delta}


def _scan_mix(arguments: Arguments, choose: Callable) -> Arguments:
    """delta A of every strength, mixed over channels and states; without an input where delta is 0."""
    delta = np.arange(arguments["delta_BLD"].size).reshape(arguments["delta_BLD"].shape) * 2 % 5
    rates = np.maximum(choose(arguments["A_DN"].shape), -200)
    return arguments | {"A_DN": rates.astype(np.float32), "delta_BLD": np.array([1, 0.5, 0, 0.1, 1], np.float32)[delta]}


_RECURRENCE = _axes("a_BLN", "x_BLN")
_RECURRENCE_FULL = _RECURRENCE | {"initial_state": "BN"}
_ATTENTION = _axes("q_BLHK", "k_BLGK", "v_BLGV")
_ATTENTION_FULL = _ATTENTION | {"log_decay": "BLH"} | _axes("initial_state_BHKV")
_DELTA = _axes("q_BLHK", "k_BLHK", "v_BLHV", "beta_BLH")
_DELTA_FULL = _DELTA | _axes("log_decay_BLH", "initial_state_BHKV")
_SCAN = _axes("u_BLD", "delta_BLD", "A_DN", "B_BLN", "C_BLN")
_SCAN_FULL = _SCAN | _axes("D_D", "z_BLD", "delta_bias_D", "initial_state_BDN")
_BOUNDED = {"segment_ids": "BL"}
_WIDE, _NARROW = ("float32",), ("bfloat16",)
# Heads that fill tiles and heads that do not.
_TILES = [{"B": 2, "L": L, "H": 4, "G": 2, "K": K, "V": V} for L, K, V in ((200, 128, 128), (3, 5, 7))]
_WIDER = [{"B": 1, "L": 70, "H": 2, "G": 1, "K": 256, "V": 130}]
_PARTS = [{"B": 1, "L": 150, "H": 2, "Q": 4, "K": 48, "V": 80}]


def _variants(cases: str, sizes: list[dict[str, int]], dtypes: tuple[str, ...]) -> tuple:
    return tuple(product(cases.split(), sizes, dtypes))


RECURRENCE = Op(
    name="linear_recurrence",
    run=linear_recurrence,
    step=linear_recurrence_step,
    cases={
        "plain": (_RECURRENCE, {}),
        "full": (_RECURRENCE_FULL, {}),
        "reverse": (_RECURRENCE_FULL | _BOUNDED, {"reverse": True}),
        "complex": (_RECURRENCE_FULL | _BOUNDED, {}),
    },
    sizes={"B": 2, "N": 3},
    adjust=_recurrence_adjust,
    loop=_recurrence_loop,
    decay=_fill("a_BLN", lambda pair: np.exp(_broadcast(pair))),
    mix=_fill("a_BLN", lambda pair: np.exp(pair[1](pair[0].shape))),
    writes=("x_BLN",),
    decay_case="full",
    decay_argument="a_BLN",
    grouped_case=None,
    shared=(),
    blocks={"pallas_tpu": LinearRecurrenceBlocks(4), "pallas_gpu": LinearRecurrenceBlocks(4)},
    default_blocks=LinearRecurrenceBlocks(),
    tolerance=1e-6,
    on_gpu=(("full", 11), ("reverse", 11)),
    gpu_sizes={"N": 130},
    lowered=dict.fromkeys(
        ("tpu", "cuda"),
        _variants("full", [{"B": B, "L": L, "N": N} for B, L, N in ((1, 1, 1), (2, 300, 72), (9, 130, 640))], _WIDE),
    ),
    large={"B": 2, "N": 3},
)
ATTENTION = Op(
    name="linear_attention",
    run=linear_attention,
    step=linear_attention_step,
    cases={
        "plain": (_ATTENTION, {}),
        "constant": (_ATTENTION_FULL | {"log_decay": "H"} | _BOUNDED, {}),
        "full": (_ATTENTION_FULL, {"scale": 0.3}),
        "reverse": (_ATTENTION_FULL | _BOUNDED, {"scale": 0.3, "reverse": True}),
        "channel": (_ATTENTION_FULL | {"log_decay": "BLHK"} | _BOUNDED, {"scale": 0.3}),
        "channel_reverse": (_ATTENTION_FULL | {"log_decay": "BLHK"} | _BOUNDED, {"scale": 0.3, "reverse": True}),
    },
    sizes={"B": 2, "H": 6, "G": 3, "K": 5, "V": 7},
    adjust=_attention_adjust,
    loop=_attention_loop,
    decay=_fill("log_decay", _broadcast),
    mix=_fill("log_decay", lambda pair: pair[1](pair[0].shape)),
    writes=("v_BLGV",),
    decay_case="full",
    decay_argument="log_decay",
    grouped_case="full",
    shared=("k_BLGK", "v_BLGV"),
    blocks={
        "scan": LinearAttentionBlocks(4, 4),
        "chunked": LinearAttentionBlocks(4, 4),
        "pallas_tpu": LinearAttentionBlocks(8, 8),
        "pallas_gpu": LinearAttentionBlocks(),
    },
    default_blocks=LinearAttentionBlocks(),
    tolerance=2e-6,
    on_gpu=(("plain", 131), ("constant", 131), ("full", 131), ("channel", 37)),
    gpu_sizes={"B": 1, "H": 2, "G": 1},
    lowered={
        "tpu": _variants("plain full channel", _TILES, _WIDE + _NARROW),
        "cuda": _variants("channel", _TILES + _WIDER, _NARROW)
        + _variants("plain full", _TILES[:1], (*_WIDE, "float16"))
        + _variants("plain full", _WIDER + _TILES, _NARROW),
    },
    large={"B": 2, "H": 6, "G": 3, "K": 5, "V": 7},
)
DELTA = Op(
    name="delta_rule",
    run=delta_rule,
    step=delta_rule_step,
    cases={
        "plain": (_DELTA, {}),
        "full": (_DELTA_FULL, {"scale": 0.5}),
        "reverse": (_DELTA_FULL | _BOUNDED, {"scale": 0.5, "reverse": True}),
        "queries": (_DELTA_FULL | {"q_BLHK": "BLQK"} | _BOUNDED, {}),
    },
    sizes={"B": 2, "H": 3, "Q": 6, "K": 5, "V": 7},
    adjust=_delta_adjust,
    loop=_delta_loop,
    decay=_fill("log_decay_BLH", _broadcast),
    mix=_fill("log_decay_BLH", lambda pair: pair[1](pair[0].shape)),
    writes=("beta_BLH",),
    decay_case="full",
    decay_argument="log_decay_BLH",
    grouped_case="queries",
    shared=("k_BLHK", "v_BLHV", "beta_BLH", "log_decay_BLH", "initial_state_BHKV"),
    blocks={name: DeltaRuleBlocks(4) for name in ("scan", "chunked", "pallas_tpu")},
    default_blocks=DeltaRuleBlocks(),
    tolerance=2e-6,
    on_gpu=(("reverse", 19), ("queries", 1)),
    gpu_sizes={"B": 1},
    lowered={
        "tpu": _variants("plain queries", _PARTS, _WIDE + _NARROW),
        "cuda": _variants("plain", _PARTS, _NARROW) + _variants("queries", _PARTS, _WIDE),
    },
    large={"B": 1, "H": 2, "Q": 2, "K": 32, "V": 32},
)
SCAN = Op(
    name="selective_scan",
    run=selective_scan,
    step=selective_scan_step,
    cases={
        "plain": (_SCAN, {}),
        "full": (_SCAN_FULL, {"delta_softplus": True}),
        "reverse": (_SCAN_FULL | _BOUNDED, {"delta_softplus": True, "reverse": True}),
        "groups": (_SCAN | {"B_BLN": "BLGN", "C_BLN": "BLGN"} | _axes("D_D", "initial_state_BDN"), {}),
    },
    sizes={"B": 2, "D": 6, "G": 3, "N": 5},
    adjust=_scan_adjust,
    loop=_scan_loop,
    decay=_scan_decay,
    mix=_scan_mix,
    writes=("u_BLD",),
    decay_case="groups",
    decay_argument="delta_BLD",
    grouped_case="groups",
    shared=("B_BLN", "C_BLN"),
    blocks={
        "chunked": SelectiveScanBlocks(4, 128, 2),
        "pallas_tpu": SelectiveScanBlocks(4, 128, 2),
    },
    default_blocks=SelectiveScanBlocks(),
    tolerance=2e-6,
    on_gpu=(("reverse", 19), ("groups", 1)),
    gpu_sizes={"B": 1},
    lowered={
        platform: _variants("full", [{"B": 2, "L": 150, "D": 600, "N": N}], _WIDE + _NARROW)
        for platform, N in (("tpu", 16), ("cuda", 5))
    },
    large={"B": 1, "D": 64, "G": 1, "N": 16},
)
OPS = (RECURRENCE, ATTENTION, DELTA, SCAN)
