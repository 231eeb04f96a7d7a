"""The backbone: its forms and halves agree, and edits do what they say, where they say, and nothing else."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqmod import Backbone, BackboneConfig, Edit, backbone, low_rank_update
from seqmod.residual import reverse_gradient

pytestmark = pytest.mark.usefixtures("quick_compile")

B, L, F, D, R = 2, 7, 5, 6, 3
CONFIG = BackboneConfig(
    inputs=F,
    heads=(("action", 4), ("next", 5)),
    mixers=("attention", "rglru"),
    width=D,
    mlp=11,
    attention_heads=2,
    context=20,
)
LAYERS = range(CONFIG.layers + 1)
OPERATORS = ("replace", "add", "low_rank", "project_out")


def normal(seed: int, *shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


X_BLF = normal(1, B, L, F)
SOURCE_BLF = normal(2, B, L, F)


@pytest.fixture(scope="module")
def params(random_params):
    return random_params(backbone.init, CONFIG)


@jax.jit
def apply(params, x_BLF, edits=(), segment_ids=None):
    return backbone.apply(params, CONFIG, x_BLF, edits=edits, segment_ids=segment_ids)


@jax.jit
def run_steps(params, x_BLF, edits=()):
    """`apply` by `step`: edits, whose operands and masks have an L axis, are cut up."""

    def step(state, inputs):
        x_BF, edits = inputs
        outputs, taps, state = backbone.step(params, CONFIG, x_BF, state, edits=edits)
        return state, (outputs, taps)

    def to_time(tree):
        return jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), tree)

    state = backbone.init_state(CONFIG, B, L)
    return to_time(jax.lax.scan(step, state, (to_time(x_BLF), to_time(edits)))[1])


@partial(jax.jit, static_argnums=2)
def halves(params, x_BLF, layer, segment_ids=None):
    e_BLD = backbone.lower(params, CONFIG, x_BLF, layer, segment_ids=segment_ids)
    return e_BLD, backbone.upper(params, CONFIG, e_BLD, layer, segment_ids=segment_ids)


@partial(jax.jit, static_argnums=2)
def half_steps(params, x_BLF, layer):
    def step(states, x_BF):
        lower, upper = states
        e_BD, lower = backbone.lower_step(params, CONFIG, x_BF, lower, layer)
        outputs, upper = backbone.upper_step(params, CONFIG, e_BD, upper, layer)
        return (lower, upper), (e_BD, outputs)

    states = backbone.init_state(CONFIG, B, L, stop=layer), backbone.init_state(CONFIG, B, L, start=layer)
    return jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), jax.lax.scan(step, states, jnp.swapaxes(x_BLF, 0, 1))[1])


def assert_close(got, expected, atol=1e-5):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=atol), got, expected)


def assert_equal(got, expected):
    jax.tree.map(np.testing.assert_array_equal, got, expected)


def an_operand(operator: str):
    match operator:
        case "replace" | "add":
            return normal(3, B, L, D)
        case "low_rank":
            return normal(4, B, L, R, D), normal(5, B, L, D, R)
        case "project_out":
            return normal(6, D)
    raise AssertionError(operator)


# Two forms, two halves


def test_outputs_and_taps(params):
    outputs, taps = apply(params, X_BLF)
    assert {name: x.shape for name, x in outputs.items()} == {"action": (B, L, 4), "next": (B, L, 5)}
    assert [tap.shape for tap in taps] == [(B, L, D)] * 3
    np.testing.assert_allclose(
        taps[0], X_BLF @ params["embed"]["kernel"] + params["embed"]["bias"][None, None], atol=1e-6
    )


def test_steps_agree_with_the_parallel_form(params):
    assert_close(run_steps(params, X_BLF), apply(params, X_BLF))


def test_edited_steps_agree_with_the_parallel_form(params):
    masks = jnp.asarray(np.random.default_rng(7).random((3, B, L)) < 0.5)
    edits = [
        Edit(layer, operator, an_operand(operator), mask)
        for layer, operator, mask in zip((0, 2, 1), ("replace", "add", "low_rank"), masks, strict=True)
    ]
    assert_close(run_steps(params, X_BLF, edits), apply(params, X_BLF, edits))


@pytest.mark.parametrize("layer", LAYERS)
def test_halves_make_the_whole_at_every_layer(params, layer):
    outputs, taps = apply(params, X_BLF)
    assert_close(halves(params, X_BLF, layer), (taps[layer], outputs))
    assert_close(half_steps(params, X_BLF, layer), (taps[layer], outputs))


def test_segments_are_sequences_of_their_own(params):
    ids = jnp.array([[0] * 3 + [1] * 4] * B)
    packed = apply(params, X_BLF, segment_ids=ids)
    assert_close(jax.tree.map(lambda x: x[:, :3], packed), jax.tree.map(lambda x: x[:, :3], apply(params, X_BLF)))
    assert_close(jax.tree.map(lambda x: x[:, 3:], packed), apply(params, X_BLF[:, 3:]))
    lower, outputs = halves(params, X_BLF, 1, ids)
    assert_close((outputs, lower), (packed[0], packed[1][1]))


def test_the_linen_module_is_the_pure_function(params):
    module = Backbone(CONFIG)
    shapes = jax.eval_shape(module.init, jax.random.key(0), X_BLF)["params"]["backbone"]
    assert jax.tree.map(jnp.shape, shapes) == jax.tree.map(jnp.shape, params)
    edits = [Edit(2, "add", normal(3, D))]
    assert_equal(
        jax.jit(module.apply)({"params": {"backbone": params}}, X_BLF, edits=edits), apply(params, X_BLF, edits)
    )


# Operators, against their formulas


@jax.jit
def edited(params, operands):
    """The stream at layer 1, and after one edit of it by each of (operator, operand)."""
    before = apply(params, X_BLF)[1][1]
    return before, {name: apply(params, X_BLF, [Edit(1, name.split()[0], x)])[1][1] for name, x in operands.items()}


def test_operators(params):
    whole, row = normal(3, B, L, D), normal(4, D)
    down, up, v = normal(5, B, L, R, D), normal(6, B, L, D, R), normal(7, D)
    before, after = edited(
        params,
        {
            "replace": whole,
            "replace all": row,
            "add": whole,
            "add all": row,
            "low_rank": (down, up),
            "low_rank all": (down[0, 0], up[0, 0]),
            "project_out": v,
        },
    )
    before, whole, row, down, up, v = (np.float64(x) for x in (before, whole, row, down, up, v))
    np.testing.assert_array_equal(after["replace"], whole)
    np.testing.assert_array_equal(after["replace all"], np.broadcast_to(row, (B, L, D)))
    expected = {
        "add": before + whole,
        "add all": before + row,
        "low_rank": before + (up @ (down @ before[..., None]))[..., 0],
        "low_rank all": before @ (np.eye(D) + up[0, 0] @ down[0, 0]).T,
        "project_out": before - (before @ v)[..., None] * v / (v @ v),
    }
    for name, value in expected.items():
        np.testing.assert_allclose(after[name], value, rtol=1e-4, atol=1e-5, err_msg=name)
    np.testing.assert_allclose(np.float64(after["project_out"]) @ v, 0, atol=1e-5)


def test_low_rank_update_is_the_edit(params):
    before, after = edited(params, {"low_rank": (normal(5, R, D), normal(6, D, R))})
    updated = low_rank_update(before[0, 0], normal(5, R, D), normal(6, D, R))
    np.testing.assert_allclose(updated, after["low_rank"][0, 0], rtol=1e-5, atol=1e-6)


def test_reverse_gradient(params):
    """Nothing changes forward; the gradient of all that lies below the edit is multiplied, and of nothing else."""

    @jax.jit
    def run(params, strength):
        def loss(params):
            return jnp.square(apply(params, X_BLF, [Edit(1, "reverse_gradient", strength)])[0]["action"]).sum()

        return jax.value_and_grad(loss)(params)

    value, plain = run(params, jnp.float32(-1))  # reversed twice
    np.testing.assert_allclose(value, jnp.square(apply(params, X_BLF)[0]["action"]).sum(), rtol=1e-5)
    same_value, turned = run(params, jnp.float32(0.3))
    assert same_value == value
    for name, factor in (("embed", -0.3), ("block_0", -0.3), ("block_1", 1), ("norm", 1), ("heads", 1)):
        assert max(np.abs(leaf).max() for leaf in jax.tree.leaves(plain[name])) > 0.01
        assert_close(turned[name], jax.tree.map(lambda g, factor=factor: factor * g, plain[name]))
    by_stream, by_strength = jax.grad(lambda e, s: reverse_gradient(e, s).sum(), (0, 1))(jnp.ones(3), 0.3)
    np.testing.assert_allclose(by_stream, -0.3)
    assert by_strength == 0


# Exact properties of edits


def test_an_edit_that_changes_nothing_changes_nothing(params):
    outputs, taps = apply(params, X_BLF)
    assert_equal(apply(params, X_BLF, [Edit(layer, "replace", taps[layer]) for layer in LAYERS]), (outputs, taps))
    none = normal(4, R, D), jnp.zeros((D, R))
    assert_equal(apply(params, X_BLF, [Edit(layer, "low_rank", none) for layer in LAYERS]), (outputs, taps))
    nowhere = jnp.zeros((B, L), bool)
    edits = [Edit(layer, operator, an_operand(operator), nowhere) for layer in LAYERS for operator in OPERATORS]
    assert_equal(apply(params, X_BLF, edits), (outputs, taps))


@pytest.mark.parametrize("operator", ["replace", "low_rank"])
def test_an_edit_reaches_later_steps_and_layers_only(params, operator):
    outputs, taps = apply(params, X_BLF)
    time = 4
    mask_BL = jnp.zeros((B, L), bool).at[0, time].set(True)
    edited_outputs, edited_taps = apply(params, X_BLF, [Edit(1, operator, an_operand(operator), mask_BL)])
    np.testing.assert_array_equal(edited_taps[0], taps[0])
    changed_BL = np.any(np.asarray(edited_taps[1] != taps[1]), axis=-1)
    np.testing.assert_array_equal(changed_BL, mask_BL)
    pairs = [(edited_taps[2], taps[2]), *((edited_outputs[name], outputs[name]) for name in outputs)]
    for after, before in pairs:
        np.testing.assert_array_equal(after[1], before[1])
        np.testing.assert_array_equal(after[0, :time], before[0, :time])
        assert (after[0, time:] != before[0, time:]).any(-1).all()


@pytest.mark.parametrize("layer", LAYERS)
def test_replacing_the_whole_stream_gives_the_source_run(params, layer):
    source_outputs, source = apply(params, SOURCE_BLF)
    outputs, taps = apply(params, X_BLF, [Edit(layer, "replace", source[layer])])
    assert_equal((outputs, taps[layer:]), (source_outputs, source[layer:]))
    assert layer == 0 or (taps[0] != source[0]).any()


def test_edits_of_one_layer_apply_in_order(params):
    one, two = normal(3, B, L, D), normal(4, B, L, D)
    both = apply(params, X_BLF, [Edit(1, "add", one), Edit(1, "add", two)])
    assert_close(both, apply(params, X_BLF, [Edit(1, "add", one + two)]))
    swapped = apply(params, X_BLF, [Edit(1, "add", two), Edit(2, "add", one), Edit(1, "replace", one)])
    np.testing.assert_array_equal(swapped[1][1], one)


def test_vmap_over_edits_is_a_loop_over_edits(params):
    operands = normal(3, 3, B, L, D)
    many = jax.vmap(lambda operand: apply(params, X_BLF, [Edit(1, "add", operand)]))(operands)
    for index in range(3):
        one = apply(params, X_BLF, [Edit(1, "add", operands[index])])
        assert_close(jax.tree.map(lambda x, index=index: x[index], many), one)


# Errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mixers": ("attention", "mamba3")}, "mixer 'mamba3' is unknown, expected one of"),
        ({"mixers": ()}, "mixers is empty"),
        ({"mlp": -1}, "mlp -1, conditioning 0 and row_chunk 0 not negative"),
        ({"width": 7}, "width 7 is not divisible by heads 4"),
        ({"context": 12}, "max_distance is 12, expected more than 16"),
        ({"heads": (("a", 3), ("a", 5))}, "name a head twice"),
    ],
)
def test_a_bad_config_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        BackboneConfig(**{"inputs": F, "heads": (("action", 4),), **arguments})


def test_a_bad_layer_state_or_operator_is_refused(params):
    state = backbone.init_state(CONFIG, B, L)
    half = backbone.init_state(CONFIG, B, L, stop=1)
    x_BF, e_BD, e_BLD = X_BLF[:, 0], jnp.zeros((B, D)), jnp.zeros((B, L, D))
    for layer in (-1, 3):
        edits = [Edit(layer, "add", jnp.zeros(D))]
        for call in (
            lambda edits=edits: backbone.apply(params, CONFIG, X_BLF, edits=edits),
            lambda edits=edits: backbone.step(params, CONFIG, x_BF, state, edits=edits),
            lambda layer=layer: backbone.lower(params, CONFIG, X_BLF, layer),
            lambda layer=layer: backbone.upper(params, CONFIG, e_BLD, layer),
            lambda layer=layer: backbone.lower_step(params, CONFIG, x_BF, half, layer),
            lambda layer=layer: backbone.upper_step(params, CONFIG, e_BD, half, layer),
            lambda layer=layer: backbone.init_state(CONFIG, B, L, start=layer),
        ):
            with pytest.raises(ValueError, match=f"layer is {layer}, expected 0"):
                call()
    with pytest.raises(ValueError, match="step: state has 1 blocks, expected 2"):
        backbone.step(params, CONFIG, x_BF, half)
    with pytest.raises(ValueError, match="lower_step: state has 1 blocks, expected 2"):
        backbone.lower_step(params, CONFIG, x_BF, half, 2)
    with pytest.raises(ValueError, match="upper_step: state has 2 blocks, expected 1"):
        backbone.upper_step(params, CONFIG, e_BD, state, 1)
    with pytest.raises(ValueError, match="operator is 'rotate', expected one of"):
        jax.eval_shape(lambda: backbone.apply(params, CONFIG, X_BLF, edits=[Edit(1, "rotate", jnp.zeros(D))]))
