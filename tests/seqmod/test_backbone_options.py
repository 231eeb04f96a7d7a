"""What a backbone can be besides a causal model of features: each option against the plain model or by hand."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqmod import BackboneConfig, Edit, Inputs, backbone
from seqmod.mixers import MIXERS, AttentionConfig
from seqmod.mixers.rglru import RGLRUConfig

pytestmark = pytest.mark.usefixtures("quick_compile")

B, L, F, C, V, D = 2, 7, 5, 3, 11, 8
CONFIG = BackboneConfig(
    inputs=F,
    heads=(("token", V), ("value", 1)),
    mixers=("attention", "rglru"),
    width=D,
    mlp=13,
    attention_heads=2,
    context=20,
    vocabulary=V,
)


def normal(seed: int, *shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


TOKENS_BL = jnp.asarray(np.random.default_rng(0).integers(0, V, (B, L)))
FEATURES_BLF = normal(1, B, L, F)
CONDITIONING_BLC = normal(2, B, L, C)


@partial(jax.jit, static_argnums=1)
def apply(params, config, inputs, **options):
    return backbone.apply(params, config, inputs, **options)


@partial(jax.jit, static_argnums=1)
def run_steps(params, config, inputs, prefix_BPD=None):
    state = backbone.init_state(config, B, 2 * L)
    if prefix_BPD is not None:
        for p in range(prefix_BPD.shape[1]):
            _, state = backbone.upper_step(params, config, prefix_BPD[:, p], state, 0)

    def step(state, inputs):
        outputs, taps, state = backbone.step(params, config, inputs, state)
        return state, (outputs, taps)

    def to_time(tree):
        return jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), tree)

    return to_time(jax.lax.scan(step, state, to_time(inputs))[1])


def assert_close(got, expected, rtol=1e-4, atol=2e-5):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=atol), got, expected)


# Inputs


def test_tokens_features_and_both(random_params):
    params = random_params(backbone.init, CONFIG)
    features = FEATURES_BLF @ params["embed"]["kernel"] + params["embed"]["bias"][None, None]
    rows = params["tokens"][TOKENS_BL]
    for inputs, expected in (
        (FEATURES_BLF, features),
        (TOKENS_BL, rows),
        (Inputs(tokens=TOKENS_BL), rows),
        (Inputs(features=FEATURES_BLF, tokens=TOKENS_BL), features + rows),
        (Inputs(features=FEATURES_BLF, tokens=TOKENS_BL.at[:, 3].set(-1)), features + rows.at[:, 3].set(0)),
    ):
        outputs, taps = apply(params, CONFIG, inputs)
        np.testing.assert_allclose(taps[0], expected, rtol=1e-5, atol=1e-6)
        assert_close(run_steps(params, CONFIG, inputs), (outputs, taps))


@pytest.mark.parametrize("positions", ["none", "learned"])
def test_a_prefix_comes_before_the_inputs(random_params, positions):
    config = replace(CONFIG, positions=positions)
    params = random_params(backbone.init, config)
    prefix_BPD = normal(3, B, 2, D)
    outputs, taps = apply(params, config, TOKENS_BL, prefix_BPD=prefix_BPD)
    assert [tap.shape for tap in taps] == [(B, 2 + L, D)] * 3
    assert outputs["token"].shape == (B, L, V)
    # The same stream without the notion of a prefix.
    whole = jnp.concatenate([prefix_BPD, params["tokens"][TOKENS_BL]], axis=1)
    if positions == "learned":
        whole = whole + params["positions"][None, : L + 2]
    np.testing.assert_allclose(taps[0], whole, rtol=1e-6)
    upper = jax.jit(partial(backbone.upper, config=config, layer=0))
    assert_close(outputs, jax.tree.map(lambda x: x[:, 2:], upper(params, e_BLD=whole)))
    assert_close(run_steps(params, config, TOKENS_BL, prefix_BPD)[0], outputs)


def test_learned_positions_start_anew_in_each_segment(random_params):
    config = replace(CONFIG, positions="learned")
    params = random_params(backbone.init, config)
    outputs, taps = apply(params, config, TOKENS_BL)
    np.testing.assert_allclose(taps[0], params["tokens"][TOKENS_BL] + params["positions"][None, :L], rtol=1e-6)
    assert_close(run_steps(params, config, TOKENS_BL), (outputs, taps))
    packed, _ = apply(params, config, TOKENS_BL, segment_ids=jnp.array([[4] * 3 + [1] * 4] * B))
    alone, _ = apply(params, config, TOKENS_BL[:, 3:])
    assert_close(jax.tree.map(lambda x: x[:, 3:], packed), alone)


def test_conditioning_shifts_and_scales_each_token(random_params):
    config = replace(CONFIG, conditioning=C)
    params = random_params(backbone.init, config)
    inputs = Inputs(tokens=TOKENS_BL, conditioning=CONDITIONING_BLC)
    outputs, taps = apply(params, config, inputs)
    assert_close(run_steps(params, config, inputs), (outputs, taps))
    # A fresh model does not depend on it; then each token's conditioning reaches that token and later ones.
    fresh = jax.jit(backbone.init, static_argnums=1)(jax.random.key(0), config)
    assert_close(apply(fresh, config, inputs), apply(fresh, config, TOKENS_BL))
    other, _ = apply(params, config, inputs._replace(conditioning=CONDITIONING_BLC.at[:, 4].add(1.0)))
    changed_L = np.any(np.asarray(other["token"] != outputs["token"]), axis=(0, 2))
    np.testing.assert_array_equal(changed_L, np.arange(L) >= 4)


def test_a_mask_hides_padding(random_params):
    params = random_params(backbone.init, CONFIG)
    mask_BL = jnp.arange(L)[None] >= jnp.array([3, 2])[:, None]
    outputs, _ = apply(params, CONFIG, TOKENS_BL, mask_BL=mask_BL)
    for row, start in enumerate((3, 2)):
        alone, _ = apply(params, CONFIG, TOKENS_BL[row : row + 1, start:])
        assert_close(
            jax.tree.map(lambda x, row=row, start=start: x[row, start:], outputs), {k: v[0] for k, v in alone.items()}
        )


# Parts


def float64(tree):
    return jax.tree.map(lambda x: np.asarray(x, np.float64), tree)


def test_blocks_of_published_models_by_hand(random_params):
    """Layer norm and a biased MLP, as GPT-2 has them; a gated MLP, as Llama; none, as Mamba."""
    e = np.random.default_rng(0).standard_normal((B, L, D))

    def gelu(x):
        return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))

    for options in (
        {"norm": "layer", "epsilon": 0.1, "activation": "gelu", "output_bias": True},
        {"activation": "swiglu", "epsilon": 0.2},
        {"activation": "geglu", "output_bias": True},
        {"mlp": 0},
    ):
        config = replace(CONFIG, mixers=("rglru",), **options)
        params = random_params(backbone.init, config)
        silent = {"block_0": params["block_0"] | {"mixer": jax.tree.map(jnp.zeros_like, params["block_0"]["mixer"])}}
        got = backbone.upper(params | silent, config, jnp.asarray(e, jnp.float32), 0)["value"]
        p = float64(params)

        def norm(gain, x, config=config):
            if config.norm == "rms":
                return x / np.sqrt((x**2).mean(-1, keepdims=True) + config.epsilon) * gain
            centred = x - x.mean(-1, keepdims=True)
            scaled = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + config.epsilon)
            return scaled * gain["gain"] + gain["bias"]

        after, block = e, p["block_0"]
        if config.mlp:
            normed = norm(block["mlp_norm"], e)
            hidden = normed @ block["mlp_up"] + block["mlp_up_bias"]
            if config.activation == "gelu":
                hidden = gelu(hidden)
            else:
                gate = normed @ block["mlp_gate"] + block["mlp_gate_bias"]
                hidden *= gate / (1 + np.exp(-gate)) if config.activation == "swiglu" else gelu(gate)
            after = e + hidden @ block["mlp_down"] + block.get("mlp_down_bias", 0.0)
        head = p["heads"]["value"]
        np.testing.assert_allclose(got, norm(p["norm"], after) @ head["kernel"] + head["bias"], rtol=2e-4, atol=2e-5)


def test_a_tied_head_reads_with_the_embeddings(random_params):
    config = replace(CONFIG, tied="token", embedding_scale=3.0, logit_cap=0.5)
    params = random_params(backbone.init, config)
    assert "kernel" not in params["heads"]["token"]
    outputs, taps = apply(params, config, TOKENS_BL)
    np.testing.assert_allclose(taps[0], 3 * params["tokens"][TOKENS_BL], rtol=1e-6)
    plain = replace(config, tied=None, logit_cap=None)
    head = {"kernel": params["tokens"].T, "bias": params["heads"]["token"]["bias"]}
    untied, _ = apply(params | {"heads": params["heads"] | {"token": head}}, plain, TOKENS_BL)
    np.testing.assert_allclose(outputs["token"], 0.5 * jnp.tanh(untied["token"] / 0.5), rtol=1e-4, atol=1e-6)


def test_a_mixer_by_its_config(random_params):
    by_name = replace(CONFIG, mixers=("rglru", "rglru"))
    by_config = replace(CONFIG, mixers=(RGLRUConfig(width=D, recurrence=D, heads=2), "rglru"))
    params = random_params(backbone.init, by_name)
    assert_close(apply(params, by_config, TOKENS_BL), apply(params, by_name, TOKENS_BL))
    wide = replace(CONFIG, mixers=(RGLRUConfig(width=D, recurrence=6, heads=2), "attention"))
    assert random_params(backbone.init, wide)["block_0"]["mixer"]["decay"].shape == (6,)


def test_causal_and_bidirectional_blocks(random_params):
    """Layer-wise mask switching: with the same parameters, only the blocks that may look ahead do."""
    config = replace(CONFIG, mixers=("attention",) * 2, causal=(True, False))
    params = random_params(backbone.init, replace(config, causal=True))
    before, after = (apply(params, config, TOKENS_BL.at[:, -1].set(last))[1] for last in (0, 1))
    np.testing.assert_array_equal(before[1][:, :-1], after[1][:, :-1])
    assert (before[2][:, :-1] != after[2][:, :-1]).any(-1).all()
    with pytest.raises(ValueError, match="block 1 is AttentionConfig, not causal: it has no step form"):
        backbone.init_state(config, B, L)
    assert len(backbone.init_state(config, B, L, stop=1)) == 1


# How it is compiled


@pytest.mark.parametrize("mixers", [("attention", "rglru") * 3, ("rglru",) * 4, ("attention", "attention", "rglru")])
def test_scanned_blocks_are_the_same_model(random_params, mixers):
    plain = replace(CONFIG, mixers=mixers, conditioning=C)
    config = replace(plain, scan=True)
    stacked = random_params(backbone.init, config)
    loose = {key: value for key, value in stacked.items() if key != "blocks"}
    for layer in range(config.layers):
        group, member = divmod(layer, config.period)
        loose[f"block_{layer}"] = jax.tree.map(lambda leaf, group=group: leaf[group], stacked["blocks"][member])
    assert jax.tree.map(jnp.shape, loose) == jax.tree.map(
        jnp.shape, jax.eval_shape(lambda: backbone.init(jax.random.key(0), plain))
    )
    inputs = Inputs(tokens=TOKENS_BL, conditioning=CONDITIONING_BLC)
    mask_BL = jnp.asarray(np.random.default_rng(7).random((B, L)) < 0.5)
    edits = [
        Edit(layer, operator, normal(layer, *shape), mask_BL)
        for layer, (operator, shape) in enumerate(
            (("add", (B, L, D)), ("replace", (B, L, D)), ("project_out", (D,)), ("add", (D,)))
        )
    ]
    expected = apply(loose, plain, inputs, edits=edits)
    assert_close(apply(stacked, config, inputs, edits=edits), expected)
    assert_close(run_steps(stacked, config, inputs), apply(loose, plain, inputs))
    _, taps = apply(loose, plain, inputs)
    for layer in range(config.layers + 1):
        assert_close(backbone.lower(stacked, config, inputs, layer), taps[layer])
        outputs = backbone.upper(stacked, config, taps[layer], layer, conditioning_BLC=CONDITIONING_BLC)
        assert_close(outputs, apply(loose, plain, inputs)[0])


def test_scanned_blocks_are_compiled_once():
    def lines(config: BackboneConfig) -> int:
        params = jax.eval_shape(lambda: backbone.init(jax.random.key(0), config))
        return len(jax.jit(lambda p: backbone.apply(p, config, TOKENS_BL)[0]).lower(params).as_text().splitlines())

    deep = replace(CONFIG, mixers=("rglru",) * 12)
    assert lines(replace(deep, scan=True)) < lines(deep) / 4


@pytest.mark.parametrize("scan", [False, True])
def test_remat_changes_memory_only(random_params, scan):
    config = replace(CONFIG, mixers=("attention",) * 6, scan=scan)
    params = random_params(backbone.init, config)
    tokens_BL = jnp.tile(TOKENS_BL, (1, 20))

    def compiled(config):
        def loss(params):
            return jnp.square(backbone.apply(params, config, tokens_BL)[0]["token"]).mean()

        return jax.jit(jax.grad(loss)).lower(params).compile()

    plain, remat = compiled(config), compiled(replace(config, remat=True))
    assert_close(remat(params), plain(params))
    ratio = plain.memory_analysis().temp_size_in_bytes / remat.memory_analysis().temp_size_in_bytes
    assert ratio > 2


def test_bfloat16_streams_and_float32_outputs(random_params):
    config = replace(CONFIG, dtype="bfloat16", positions="learned", conditioning=C)
    params = random_params(backbone.init, config)
    inputs = Inputs(features=FEATURES_BLF, tokens=TOKENS_BL, conditioning=CONDITIONING_BLC)
    outputs, taps = apply(params, config, inputs)
    assert {tap.dtype for tap in taps} == {jnp.dtype(jnp.bfloat16)}
    exact, _ = apply(params, replace(config, dtype="float32"), inputs)
    for name, output in outputs.items():
        assert output.dtype == jnp.float32
        assert np.linalg.norm(output - exact[name]) < 0.05 * np.linalg.norm(exact[name])
    stepped, step_taps = run_steps(params, config, inputs)
    assert step_taps[1].dtype == jnp.bfloat16
    assert np.linalg.norm(stepped["token"] - exact["token"]) < 0.05 * np.linalg.norm(exact["token"])
    grads = jax.jit(jax.grad(lambda p: backbone.apply(p, config, inputs)[0]["token"].sum()))(params)
    assert {leaf.dtype for leaf in jax.tree.leaves(grads)} == {jnp.dtype(jnp.float32)}


@pytest.mark.parametrize("name", MIXERS)
def test_gradients_are_finite_at_depth_24(name):
    """Compiled once for all layers: 24 of them take no longer than one."""
    causal = "causal self" in MIXERS[name].patterns
    config = replace(CONFIG, mixers=(name,) * 24, causal=causal, scan=True, width=18, attention_heads=3)

    @jax.jit
    def grads(key):
        def loss(params):
            return jnp.square(backbone.apply(params, config, TOKENS_BL)[0]["token"] - 1).mean()

        return jax.grad(loss)(backbone.init(key, config))

    for path, leaf in jax.tree.leaves_with_path(grads(jax.random.key(0))):
        assert np.isfinite(leaf).all(), jax.tree_util.keystr(path)
        if "blocks" in jax.tree_util.keystr(path) and "mlp_down" in jax.tree_util.keystr(path):
            # The first block learns as well as the last.
            first, last = (np.linalg.norm(leaf[layer]) for layer in (0, -1))
            assert 1e-3 < first / last < 1e3


# Errors


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"inputs": 0, "vocabulary": 0}, "inputs is 0 and vocabulary 0, expected a positive number"),
        ({"tied": "value"}, "tied is 'value', expected a head with the 11 outputs"),
        ({"tied": "other"}, "tied is 'other'"),
        ({"causal": (True,)}, "causal has 1 entries, expected 2"),
        ({"positions": "sine"}, "positions is 'sine', expected one of"),
        ({"dtype": "float16"}, "dtype is 'float16', expected one of"),
        ({"activation": "tanh"}, "activation is 'tanh', expected one of"),
        ({"norm": "batch"}, "norm is 'batch', expected one of"),
        ({"mixers": (RGLRUConfig(width=6, recurrence=6, heads=2),)}, "the mixer's width is 6, expected 8"),
        ({"mixers": (3,)}, "3 is no config of a mixer"),
        ({"causal": False, "mixers": ("rglru",)}, "rglru: causal is False"),
    ],
)
def test_a_bad_option_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        replace(CONFIG, **options)


def test_bad_inputs_are_refused(random_params):
    config = replace(CONFIG, inputs=0, positions="learned", context=20)
    params = random_params(backbone.init, config)
    for inputs, message in (
        (FEATURES_BLF, "inputs have features, but the config has a size of 0"),
        (Inputs(tokens=TOKENS_BL, conditioning=CONDITIONING_BLC), "inputs have conditioning, but"),
        (Inputs(), "neither features nor tokens"),
        (jnp.zeros((B, 21), jnp.int32), "inputs have 21 steps, more than the 20 learned positions"),
    ):
        with pytest.raises(ValueError, match=message):
            backbone.apply(params, config, inputs)
    with pytest.raises(ValueError, match=r"features has shape \(2, 7, 4\), expected 5 in its last axis"):
        backbone.apply(params, CONFIG, FEATURES_BLF[..., :4])


def test_attention_configs_are_hashable_in_a_backbone():
    config = replace(CONFIG, mixers=(AttentionConfig(width=D, heads=2, head_dim=4),) * 2)
    assert hash(config) == hash(replace(config))
