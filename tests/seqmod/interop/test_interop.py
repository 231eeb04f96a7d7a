"""Published models: logits and the residual stream as `transformers` computes them, and what is refused."""

import json
from functools import cache
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_dtypes import bfloat16
from safetensors.numpy import load_file, save_file

from seqmod import backbone, interop
from seqmod.interop.published import read

pytestmark = pytest.mark.usefixtures("quick_compile")

FIXTURES = Path(__file__).with_name("fixtures")
NAMES = sorted(path.name for path in FIXTURES.iterdir())


@cache
def published(name):
    return read(FIXTURES / name)


@cache
def expected(name):
    """Tokens, and what to compare: logits and the stream at every layer."""
    arrays = load_file(FIXTURES / name / "expected.safetensors")
    layers = len(arrays) - 2
    return jnp.asarray(arrays["tokens"]), (arrays["logits"], *(arrays[f"hidden_{layer}"] for layer in range(layers)))


def parallel(params, config, tokens_BL):
    outputs, taps = jax.jit(backbone.apply, static_argnums=1)(params, config, tokens_BL)
    return outputs["logits"], *taps


def stepwise(params, config, tokens_BL):
    B, L = tokens_BL.shape

    def step(state, tokens_B):
        outputs, taps, state = backbone.step(params, config, tokens_B, state)
        return state, (outputs["logits"], *taps)

    _, outputs = jax.lax.scan(step, backbone.init_state(config, B, L), tokens_BL.T)
    return tuple(jnp.swapaxes(each, 0, 1) for each in outputs)


def check(actual, wanted):
    assert len(actual) == len(wanted)
    for ours, theirs in zip(actual, wanted, strict=True):
        assert ours.shape == theirs.shape
        assert np.abs(ours - theirs).max() < 1e-5 * np.abs(theirs).max()


def test_every_family_has_a_fixture():
    assert {published(name)[0]["model_type"] for name in NAMES} == set(interop.FAMILIES)


@pytest.mark.parametrize("form", [parallel, stepwise])
@pytest.mark.parametrize("name", NAMES)
def test_logits_and_stream_are_those_of_transformers(name, form):
    config, params = interop.load(FIXTURES / name)
    tokens_BL, wanted = expected(name)
    check(form(params, config, tokens_BL), wanted)


@pytest.mark.parametrize("name", NAMES)
def test_params_have_the_structure_of_fresh_ones(name):
    config, params = interop.load(FIXTURES / name)
    fresh = jax.eval_shape(lambda: backbone.init(jax.random.key(0), config))
    assert jax.tree.map(lambda x: (x.shape, x.dtype), params) == jax.tree.map(lambda x: (x.shape, x.dtype), fresh)


# Files


def test_a_file_is_loaded_with_options_given(tmp_path):
    options, arrays = published("llama")
    save_file(dict(arrays), tmp_path / "weights.safetensors")
    config, params = interop.load(tmp_path / "weights.safetensors", options)
    same = jax.tree.map(np.array_equal, params, interop.load(FIXTURES / "llama")[1])
    assert all(jax.tree.leaves(same))
    assert config == interop.load(FIXTURES / "llama")[0]


def test_shards_are_all_read():
    folder = FIXTURES / "mistral"
    shards = sorted(folder.glob("model-*.safetensors"))
    assert len(shards) > 1
    assert not (folder / "model.safetensors").exists()
    assert set(published("mistral")[1]) == {name for shard in shards for name in load_file(shard)}


def test_bfloat16_is_widened_without_loss():
    _, arrays = published("mistral")
    assert {array.dtype for array in arrays.values()} == {np.dtype(bfloat16)}
    _, params = interop.load(FIXTURES / "mistral")
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype(np.float32)}
    assert np.array_equal(params["tokens"], arrays["model.embed_tokens.weight"].astype(np.float32))


def folder(tmp_path, **files):
    for name, content in files.items():
        (tmp_path / name).write_text(content, encoding="utf-8")
    return tmp_path


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "no config.json"),
        ({"config.json": "{}"}, "neither model.safetensors nor model.safetensors.index.json"),
        (
            {"config.json": "{}", "model.safetensors.index.json": '{"weight_map": {"a": "model-1.safetensors"}}'},
            "no model-1.safetensors",
        ),
    ],
)
def test_files_that_are_not_there_are_named(tmp_path, files, message):
    with pytest.raises(ValueError, match=message):
        interop.load(folder(tmp_path, **files))


def test_a_file_without_options_is_refused():
    with pytest.raises(ValueError, match=r"model\.safetensors is not a folder"):
        interop.load(FIXTURES / "llama" / "model.safetensors")


# Names of older files


def test_constants_of_older_files_are_ignored():
    options, arrays = published("gpt2")
    mask = np.tril(np.ones((1, 1, 23, 23), np.float32))
    _, params = interop.convert(options, arrays | {"transformer.h.0.attn.bias": mask})
    assert np.array_equal(params["block_0"]["mlp_up"], arrays["transformer.h.0.mlp.c_fc.weight"])
    options, arrays = published("llama")
    interop.convert(options, arrays | {"model.layers.1.self_attn.rotary_emb.inv_freq": np.ones(3, np.float32)})


@pytest.mark.parametrize(
    ("name", "prefix"), [("gpt2", "transformer."), ("mamba", "backbone."), ("llama_bias", "model.")]
)
def test_names_may_lack_their_prefix(name, prefix):
    options, arrays = published(name)
    config, params = interop.convert(options, {key.removeprefix(prefix): array for key, array in arrays.items()})
    tokens_BL, wanted = expected(name)
    check(parallel(params, config, tokens_BL), wanted)


def test_a_copy_of_a_tied_matrix_is_accepted_and_another_matrix_is_not():
    options, arrays = published("gpt2")
    embedding = arrays["transformer.wte.weight"]
    config, params = interop.convert(options, arrays | {"lm_head.weight": embedding})
    assert config.tied == "logits"
    assert "kernel" not in params["heads"]["logits"]
    with pytest.raises(ValueError, match=r"lm_head.weight is not equal to transformer\.wte\.weight"):
        interop.convert(options, arrays | {"lm_head.weight": embedding + 1})


def test_rotations_may_be_given_as_older_configs_do():
    options, arrays = published("llama_bias")
    older = {key: value for key, value in options.items() if key != "rope_parameters"}
    config, _ = interop.convert(older | {"rope_theta": 50.0, "rope_scaling": None}, arrays)
    assert config == interop.convert(options, arrays)[0]
    assert config.mixers[0].rope_base == 50.0
    assert interop.convert(older, arrays)[0].mixers[0].rope_base == 10000.0


def test_a_scaling_may_be_given_as_older_configs_do():
    options, arrays = published("llama_3")
    given = dict(options["rope_parameters"])
    older = {key: value for key, value in options.items() if key != "rope_parameters"}
    older |= {"rope_theta": given.pop("rope_theta"), "rope_scaling": given}
    assert interop.convert(older, arrays)[0] == interop.convert(options, arrays)[0]


def test_windows_follow_their_layers():
    assert [mixer.window for mixer in interop.load(FIXTURES / "qwen2")[0].mixers] == [None, 7]
    options, arrays = published("qwen2")
    older = {key: value for key, value in options.items() if key != "layer_types"}
    windows = {
        0: [7, 7],
        1: [None, 7],
        2: [None, None],
    }
    for first, wanted in windows.items():
        config, _ = interop.convert(older | {"max_window_layers": first}, arrays)
        assert [mixer.window for mixer in config.mixers] == wanted
    config, _ = interop.convert(older | {"use_sliding_window": False}, arrays)
    assert [mixer.window for mixer in config.mixers] == [None, None]


# What is refused


@pytest.mark.parametrize(
    ("name", "changed", "message"),
    [
        ("llama", {"model_type": "bert"}, r"model_type is 'bert', expected one of \['gpt2', 'llama', 'mamba'"),
        ("llama", {"model_type": None}, "model_type is None"),
        ("llama", {"quantization_config": {"bits": 4}}, r"quantization_config is \{'bits': 4\}"),
        ("llama", {"hidden_act": "gelu"}, r"hidden_act is 'gelu', expected one of \['silu', 'swish'\]"),
        ("llama", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_scaling is {'type': 'dynamic'"),
        (
            "llama",
            {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}},
            "lacks original_max_position_embeddings, low",
        ),
        ("llama", {"rope_parameters": {"rope_type": "yarn"}}, "rope_parameters is {'rope_type': 'yarn'}"),
        ("llama", {"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor is 0.5, expected 1.0"),
        ("llama", {"hidden_size": None}, "hidden_size is None, expected a positive integer"),
        ("llama", {"hidden_size": 24.0}, "hidden_size is 24.0, expected a positive integer"),
        ("llama", {"tie_word_embeddings": "no"}, r"tie_word_embeddings is 'no', expected one of \[False, True\]"),
        ("qwen2", {"layer_types": ["chunked_attention"] * 2}, "layer_types is 'chunked_attention'"),
        ("qwen2", {"layer_types": ["full_attention"]}, "layer_types has 1 entries, expected num_hidden_layers 2"),
        ("qwen2", {"use_sliding_window": False}, "layer_types is 'sliding_attention'"),
        ("mamba", {"intermediate_size": 41}, "intermediate_size is 41, expected expand \\* hidden_size, 40"),
        ("mamba", {"hidden_act": "relu"}, "hidden_act is 'relu'"),
        ("mamba2", {"use_bias": True}, r"use_bias is True, expected one of \[False\]"),
        ("mamba2", {"num_heads": 5}, "num_heads is 5, expected expand 2 times hidden_size 18 / head_dim 6"),
        ("gpt2", {"add_cross_attention": True}, "add_cross_attention is True, which has no counterpart here"),
        ("gpt2", {"activation_function": "gelu"}, "activation_function is 'gelu'"),
        ("recurrent_gemma", {"hidden_activation": "gelu"}, "hidden_activation is 'gelu'"),
        ("recurrent_gemma", {"block_types": ["recurrent", "global"]}, "block_types is 'global'"),
        ("recurrent_gemma", {"intermediate_size": 43}, "intermediate_size is 43, expected an even number"),
    ],
)
def test_an_option_without_counterpart_is_named(name, changed, message):
    options, arrays = published(name)
    with pytest.raises(ValueError, match=message):
        interop.convert(options | changed, arrays)


@pytest.mark.parametrize("name", NAMES)
def test_every_missing_tensor_is_named(name):
    options, arrays = published(name)
    names = list(arrays)
    for missing in (names[::2], names[1::2]):
        with pytest.raises(ValueError, match="tensors do not fit the config") as error:
            interop.convert(options, {key: array for key, array in arrays.items() if key not in missing})
        assert [key for key in names if f"{key} is missing" in str(error.value)] == missing


@pytest.mark.parametrize("name", NAMES)
def test_every_misshapen_tensor_is_named(name):
    options, arrays = published(name)
    longer = {key: np.concatenate([array, array[:1]]) for key, array in arrays.items()}
    with pytest.raises(ValueError, match="tensors do not fit the config") as error:
        interop.convert(options, longer)
    for key, array in arrays.items():
        shapes = list(longer[key].shape), list(array.shape)
        assert f"{key} is {array.dtype}{shapes[0]}, expected floats of shape {shapes[1]}" in str(error.value)


def test_tensors_that_are_unexpected_or_not_floats_are_named():
    options, arrays = published("llama")
    integers = {"model.norm.weight": arrays["model.norm.weight"].astype(np.int8)}
    with pytest.raises(ValueError, match=r"norm\.weight is int8\[24\], expected floats.*; extra is unexpected"):
        interop.convert(options, arrays | integers | {"extra": np.ones(3)})


def test_biases_that_a_config_does_not_announce_are_unexpected():
    options, arrays = published("llama_bias")
    with pytest.raises(ValueError, match=r"layers\.0\.self_attn\.q_proj\.bias is unexpected"):
        interop.convert(options | {"attention_bias": False}, arrays)


def test_fixtures_record_the_versions_that_made_them():
    for name in NAMES:
        content = (FIXTURES / name / "expected.safetensors").read_bytes()
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
        assert header["__metadata__"] == {"safetensors": "0.8.0", "torch": "2.13.0+cpu", "transformers": "5.24.0"}
