"""What linear attention has of its own: dense forms, both directions, the normaliser, and limits of its kernels."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels import LinearAttentionBlocks, bidirectional_linear_attention, linear_attention, linear_attention_step
from tests.kernels import family
from tests.kernels.family import FAST, LENGTH, Drawn, assert_close, boundaries, compute, draw, exact
from tests.kernels.ops import ATTENTION

pytestmark = pytest.mark.usefixtures("quick_compile")

B, H, G, K, V = ATTENTION.sizes.values()
SCALE = 0.3
UNWATCHED = plgpu.InterpretGPUParams()


def positive(case="full", L=LENGTH):
    """q, k, v and log-decays with queries and keys that are not negative, for the normaliser."""
    arguments = draw(ATTENTION, case, L).arguments
    q, k, v, g = (arguments.get(name) for name in ("q_BLHK", "k_BLGK", "v_BLGV", "log_decay"))
    return np.abs(q), np.abs(k), v, g


def matrix(q, k, g, ids=None):
    """Dense weights (B, H, L, L) of both directions, in float64; the decays of (B, L, H) count from either side."""
    q, k, g = family.wide((q, k, g))
    weights = np.einsum("bihk,bjhk->bhij", q, np.repeat(k, H // G, axis=2))
    for i, j in np.ndindex(*weights.shape[2:]):
        between = g[:, j + 1 : i + 1] if j <= i else g[:, i:j]
        weights[:, :, i, j] *= np.exp(between.sum(1))
        if ids is not None:
            weights[:, :, i, j] *= (np.diff(ids[:, min(i, j) : max(i, j) + 1]) == 0).all(1)[:, None]
    return weights


def apply(weights, v, normalise):
    weights = weights / weights.sum(-1, keepdims=True) if normalise else SCALE * weights
    return np.einsum("bhij,bjhv->bihv", weights, np.repeat(family.wide(v), H // G, axis=2))


@pytest.mark.parametrize("case", ["plain", "constant", "full"])
def test_the_reference_is_the_published_dense_form(case):
    """(Q K^T * D) V, where D_ij is the product of decays from j to i: all ones (arXiv 2006.16236), powers of one number
    for each head (arXiv 2307.08621), the semiseparable matrix (arXiv 2405.21060)."""
    q, k, v, g = positive(case)
    rows = {"plain": np.zeros((B, LENGTH, H)), "constant": np.broadcast_to(g, (B, LENGTH, H))}.get(case, g)
    y, _ = linear_attention(q, k, v, g, scale=SCALE, implementation="reference")
    assert_close(y, apply(np.tril(matrix(q, k, rows)), v, False), 2e-6)


def test_the_reference_is_the_published_gated_form():
    """((Q * A) (K / A)^T masked) V with A the products of decays (arXiv 2312.06635, section 4.2)."""
    q, k, v, g = family.wide(positive("channel"))
    A_BLHK = np.exp(np.cumsum(g, axis=1))
    scores = np.einsum("bihk,bjhk->bhij", q * A_BLHK, np.repeat(k, H // G, axis=2) / A_BLHK)
    y, _ = linear_attention(*positive("channel"), scale=SCALE, implementation="reference")
    assert_close(y, apply(np.tril(scores), v, False), 2e-6)


@pytest.mark.parametrize(
    ("implementation", "normalise", "segmented"),
    [("chunked", True, True), ("chunked", False, False), ("pallas_tpu", True, False)],
)
def test_both_directions_and_the_normaliser_are_the_dense_form(implementation, normalise, segmented):
    q, k, v, g = positive()
    ids = boundaries(B, LENGTH) if segmented else None
    options = {"segment_ids": ids, "normalise": normalise, "scale": SCALE, **family.settings(ATTENTION, implementation)}
    weights = matrix(q, k, g, ids)
    both = jax.jit(partial(bidirectional_linear_attention, **options))
    assert_close(both(q, k, v, g), apply(weights, v, normalise), 2e-6)
    y, state = jax.jit(partial(linear_attention, **options))(q, k, v, g)
    assert_close(y, apply(np.tril(weights), v, normalise), 2e-6)
    assert state.shape == (B, H, K, V + normalise)


def test_the_normaliser_carries_on_and_has_a_floor():
    q, k, v, g = positive()
    attend = jax.jit(partial(linear_attention, normalise=True))
    whole, final = attend(q, k, v, g)
    cut = LENGTH - 1
    _, state = attend(q[:, :cut], k[:, :cut], v[:, :cut], g[:, :cut])
    y, state = linear_attention_step(state, q[:, cut], k[:, cut], v[:, cut], g[:, cut], normalise=True)
    assert_close((y, state), (whole[:, cut], final), 2e-6)
    y, _ = attend(np.zeros_like(q), k, v, g)
    assert not np.any(y)


@pytest.mark.parametrize("implementation", FAST)
def test_groups_are_repeated_heads(implementation):
    drawn = draw(ATTENTION, "channel")
    found, gradients = compute(ATTENTION, implementation, drawn)
    shared = {name: np.repeat(drawn.arguments[name], H // G, axis=2) for name in ATTENTION.shared}
    wanted, slopes = exact(ATTENTION, drawn._replace(arguments=drawn.arguments | shared))
    sums = {name: slopes[name].reshape(B, LENGTH, G, H // G, -1).sum(3) for name in shared}
    assert_close((found, gradients), (wanted, slopes | sums), 2e-6)


@pytest.mark.parametrize("implementation", FAST)
def test_decays_per_channel_of_one_channel_are_those_per_head(implementation):
    drawn = draw(ATTENTION, "channel", K=1)
    assert_close(compute(ATTENTION, implementation, drawn), exact(ATTENTION, drawn), 2e-6)


@pytest.mark.parametrize("case", ["constant", "reverse", "channel"])
@pytest.mark.parametrize("implementation", ["chunked", "scan"])
def test_chunks_in_one_turn(implementation, case):
    """Nineteen chunks in turns of seven: the last turn has one that is not whole, and two that are empty."""
    drawn = draw(ATTENTION, case, 55)
    found = compute(ATTENTION, implementation, drawn, blocks=LinearAttentionBlocks(3, 3))
    assert_close(found, exact(ATTENTION, drawn), 2e-6)


def test_scans_go_by_chunks_where_gradients_are_asked_for():
    """Without gradients, shorter than a chunk, and with decays per channel, they are the scan over tokens."""
    chunk = ATTENTION.blocks["scan"].chunk
    for case, L, other in (
        ("full", chunk, "chunked"),
        ("full", chunk - 1, "reference"),
        ("channel", chunk, "reference"),
    ):
        drawn = draw(ATTENTION, case, L)
        found = compute(ATTENTION, "scan", drawn)
        assert_close(found, exact(ATTENTION, drawn), 2e-6)
        options = drawn.options | {"blocks": ATTENTION.blocks["scan"]}
        runs = {
            n: jax.jit(partial(linear_attention, implementation=n, **options)) for n in ("scan", other, "reference")
        }
        assert_close(found[0], runs[other](**drawn.arguments), 0)
        assert_close(runs["scan"](**drawn.arguments), runs["reference"](**drawn.arguments), 0)


def test_auto_is_the_scan_on_a_cpu_and_pallas_is_not_there():
    found, wanted = (linear_attention(**arrays(implementation=name)) for name in ("auto", "scan"))
    assert_close(found, wanted, 0)
    with pytest.raises(NotImplementedError, match="no Pallas kernel for the default platform cpu"):
        linear_attention(**arrays(implementation="pallas"))


# Kernels for GPUs


def test_the_gpu_kernels_round_operands_to_bfloat16():
    drawn = draw(ATTENTION, "full", 131, **ATTENTION.gpu_sizes)
    narrow = {name: jnp.asarray(drawn.arguments[name], jnp.bfloat16) for name in ("q_BLHK", "k_BLGK", "v_BLGV")}
    drawn = drawn._replace(arguments=drawn.arguments | narrow)
    found = compute(ATTENTION, "pallas_gpu", drawn, interpret=UNWATCHED)
    c_y = np.asarray(jnp.asarray(drawn.cotangents[0], jnp.bfloat16), np.float32)
    assert_close(found, exact(ATTENTION, drawn._replace(cotangents=(c_y, drawn.cotangents[1]))), 0.01)


def test_the_gpu_kernels_pass_no_gradient_across_a_boundary():
    arguments, options, (c_y, c_state) = draw(ATTENTION, "full", 131, **ATTENTION.gpu_sizes)
    arguments["segment_ids"] = (np.arange(131) >= 70)[None].astype(np.int32)
    for part, other in ((np.s_[:, :70], np.s_[:, 70:]), (np.s_[:, 70:], np.s_[:, :70])):
        c_one = np.zeros_like(c_y)
        c_one[part] = c_y[part]
        _, gradients = compute(ATTENTION, "pallas_gpu", Drawn(arguments, options, (c_one, np.zeros_like(c_state))))
        gradients.pop("initial_state_BHKV")
        assert all(not np.any(each[other]) for each in gradients.values())
        assert all(np.any(each[part]) for each in gradients.values())
        assert not np.any(gradients["log_decay"][:, 70])


def test_the_gpu_kernels_can_be_mapped():
    many = [draw(ATTENTION, "full", 131, seed, **ATTENTION.gpu_sizes) for seed in range(2)]
    run = partial(linear_attention, scale=SCALE, implementation="pallas_gpu", interpret=UNWATCHED)

    def one(arguments, cotangents):
        outputs, pull = jax.vjp(lambda each: run(**each), arguments)
        return outputs, pull(cotangents)[0]

    floats = [family.split(each.arguments)[0] for each in many]
    stacked = jax.tree.map(lambda *each: np.stack(each), *zip(floats, (each.cotangents for each in many), strict=True))
    found = jax.jit(jax.vmap(one))(*stacked)
    for i, each in enumerate(many):
        assert_close(jax.tree.map(lambda x, i=i: x[i], found), exact(ATTENTION, each), 2e-6)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_heads_wider_than_a_tile_are_several_tiles_on_gpus(dtype):
    """By the kernels for tensor cores, and by those for decays per channel, which take narrow tokens too."""
    wide = {"B": 1, "H": 1, "G": 1, "K": 67, "V": 71}
    if dtype == jnp.float32:
        drawn = draw(ATTENTION, "full", 3, **wide)
        assert_close(compute(ATTENTION, "pallas_gpu", drawn, interpret=UNWATCHED), exact(ATTENTION, drawn), 2e-6)
    else:
        family.assert_rounded_once(ATTENTION, "pallas_gpu", dtype, "channel", 3, **wide)


@pytest.mark.parametrize(("case", "L"), [("plain", 3), ("constant", 37)])
def test_the_gpu_kernels_round_float16_once(case, L):
    """It goes token by token in float32, as float32 does on a device."""
    family.assert_rounded_once(ATTENTION, "pallas_gpu", jnp.float16, case, L, **ATTENTION.gpu_sizes)


def test_states_that_float16_does_not_hold():
    """Both steps add 2^16 to one entry, of which the query reads an eighth."""
    q, k = np.full((1, 2, 1, 1), 2**-3, np.float16), np.full((1, 2, 1, 1), 2**8, np.float16)
    y, state = linear_attention(q, k, k, **family.settings(ATTENTION, "pallas_gpu"))
    assert y.dtype == jnp.float16
    assert state.item() == 2**17
    assert y.ravel().tolist() == [2**13, 2**14]


@pytest.mark.parametrize(
    ("capability", "dtype", "case", "chunks"),
    [
        ("9.0", "bfloat16", "full", True),
        ("9.0", "float16", "full", False),
        ("9.0", "float32", "full", False),
        ("9.0", "bfloat16", "channel", False),
        ("10.0", "bfloat16", "full", False),
    ],
)
def test_tensor_cores_run_what_they_bear(monkeypatch, capability, dtype, case, chunks):
    class Device:
        compute_capability = capability

    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "devices", lambda: [Device()])
    arguments = family.abstract(ATTENTION, case, ATTENTION.sizes | {"L": 3}, dtype)
    program = str(jax.make_jaxpr(lambda each: linear_attention(**each, implementation="pallas"))(arguments))
    assert [name in program for name in ("attention_by_chunks", "attention_by_tokens")] == [chunks, not chunks]


# What is refused


def arrays(**change):
    """Small arguments that are right, but for `change`."""
    arguments = draw(ATTENTION, "full", 4).arguments
    del arguments["segment_ids"]
    return arguments | change


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"q_BLHK": np.ones((2, 4, 6), np.float32)}, r"q has shape \(2, 4, 6\), expected \(B, L, H, K\)"),
        ({"q_BLHK": np.ones((2, 0, 6, 5), np.float32)}, "q has length 0"),
        ({"q_BLHK": np.ones((2, 4, 7, 5), np.float32)}, r"q has 7 heads of 5 and v 3 of 7, .* H a multiple of G"),
        ({"q_BLHK": np.ones((2, 4, 6, 5), int)}, "q has dtype int64, expected a real floating type"),
        ({"k_BLGK": np.ones((2, 4, 2, 5), np.float32)}, r"k has shape \(2, 4, 2, 5\), .* = \(2, 4, 3, 5\)"),
        ({"v_BLGV": np.ones((2, 5, 3, 7), np.float32)}, r"v has shape \(2, 5, 3, 7\), .* = \(2, 4, 3, 7\)"),
        ({"log_decay": -np.ones((2, 4, 5), np.float32)}, r"log_decay has shape \(2, 4, 5\), .* = \(2, 4, 6\)"),
        ({"log_decay": -np.ones((4, 6), np.float32)}, r"log_decay has shape \(4, 6\), expected \(H\) or"),
        ({"log_decay": np.full((6,), 0.5, np.float32)}, "log_decay has a positive entry, 0.5"),
        ({"initial_state_BHKV": np.ones((2, 6, 7, 5), np.float32)}, r"initial_state has shape \(2, 6, 7, 5\)"),
        ({"normalise": True}, r"initial_state has .*\(B, H, K, V \+ 1\) = \(2, 6, 5, 8\)"),
        ({"segment_ids": np.ones((4, 2), int)}, r"segment_ids has shape \(4, 2\), expected \(B, L\) = \(2, 4\)"),
        ({"segment_ids": np.ones((2, 4))}, "segment_ids has dtype float64, expected integers"),
        ({"implementation": "triton"}, "implementation is 'triton', expected one of auto, pallas, reference, scan,"),
    ],
)
def test_bad_arguments_are_named(change, words):
    with pytest.raises(ValueError, match="linear_attention: " + words):
        linear_attention(**arrays(**change))


def test_log_decays_that_are_constants_of_a_jit_are_looked_at():
    """As the fixed decays of a retention layer are."""
    given = {name: jnp.asarray(array) for name, array in arrays(log_decay=np.full((6,), -0.5, np.float32)).items()}
    q, g = given.pop("q_BLHK"), given.pop("log_decay")
    wanted = linear_attention(q, log_decay=g, **given)
    assert_close(jax.jit(lambda q: linear_attention(q, log_decay=g, **given))(q), wanted, 2e-6)
    growing = -g
    with pytest.raises(ValueError, match=r"log_decay has a positive entry, 0\.5"):
        jax.jit(lambda q: linear_attention(q, log_decay=growing, **given))(q)


@pytest.mark.parametrize("sizes", [{"chunk": 0}, {"channel_chunk": -8}, {"chunk": 257}])
def test_bad_blocks_are_refused(sizes):
    with pytest.raises(ValueError, match=r"LinearAttentionBlocks: chunks must be in 1\.\.256"):
        LinearAttentionBlocks(**sizes)


@pytest.mark.parametrize(
    ("implementation", "change", "words"),
    [
        ("pallas_tpu", {"blocks": LinearAttentionBlocks(12)}, "multiples of 8, got LinearAttentionBlocks"),
        ("pallas_gpu", {"blocks": LinearAttentionBlocks(128)}, "its chunks have 64 steps, got LinearAttentionBlocks"),
    ],
)
def test_kernels_say_what_they_refuse(implementation, change, words):
    narrow = {n: jnp.asarray(x, jnp.bfloat16) for n, x in arrays().items() if n in ("q_BLHK", "k_BLGK", "v_BLGV")}
    with pytest.raises(NotImplementedError, match=f"linear_attention: .*{implementation}.*{words}"):
        linear_attention(**arrays(implementation=implementation, **narrow, **change))


def test_the_gpu_kernels_need_hopper(ampere):
    with pytest.raises(NotImplementedError, match="it needs compute capability"):
        linear_attention(**arrays(implementation="pallas"))
