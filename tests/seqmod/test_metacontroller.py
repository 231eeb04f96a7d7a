"""The metacontroller against a step-by-step float64 reference, what its parts may see, and its step form."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.integrate import quad
from scipy.stats import norm

from seqmod import Metacontroller, MetacontrollerConfig, backbone, metacontroller

pytestmark = pytest.mark.usefixtures("quick_compile")

B, L, D, Z, H, S, R = 2, 7, 5, 3, 4, 6, 2
CONFIG = MetacontrollerConfig(
    width=D,
    latent=Z,
    history=H,
    embedding=S,
    rank=R,
    encoder_hidden=11,
    switch_hidden=13,
    decoder_hidden=9,
    embedder_width=8,
    gate_temperature=0.7,
)
SUFFIX = MetacontrollerConfig(**{**vars(CONFIG), "embedder": "suffix"})
E_BLD = jnp.asarray(np.random.default_rng(1).standard_normal((B, L, D)), jnp.float32)
VALID_BL = jnp.arange(L)[None] < jnp.array([[L], [4]])
SEED = 0


@pytest.fixture(scope="module")
def params(random_params):
    params = random_params(metacontroller.init, CONFIG, scale=0.6)
    # One proposal's log sigma lies beyond where it is clipped.
    params["encoder"]["out_bias"] = params["encoder"]["out_bias"].at[2 * Z - 1].set(4.0)
    return params


@partial(jax.jit, static_argnums=0, static_argnames=("forced_beta", "deterministic", "gate_noise", "binary"))
def unroll(config, params, e_BLD=E_BLD, valid_BL=VALID_BL, **options):
    return metacontroller.unroll(params, config, jax.random.key(SEED), e_BLD, valid_BL, **options)


@partial(jax.jit, static_argnums=0)
def embed(config, params, e_BLD=E_BLD, valid_BL=VALID_BL):
    return metacontroller.embed(params, config, e_BLD, valid_BL)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def kl(mu_Z, log_sigma_Z):
    """Of the proposal to the standard normal, whatever the gate does with it."""
    return ((mu_Z**2 + np.exp(log_sigma_Z) ** 2 - 1) / 2 - log_sigma_Z).sum(-1)


def normalise(e_D):
    return e_D / np.sqrt((e_D**2).mean() + 1e-6)


def reference(params, config, e_LD, s_LS, noise_LZ, gate_L, *, forced_beta=None, binary=False):
    """One sequence through the equations of the module's docstring, step by step. Returns z, beta, mu and log sigma."""
    p = {name: jax.tree.map(np.float64, params[name]) for name in ("gru", "encoder", "switch")}
    h_H, z_Z, trace = np.zeros(H), np.zeros(Z), []
    for t, e_D in enumerate(e_LD):
        seen = normalise(e_D)
        encoder, switch, gru = p["encoder"], p["switch"], p["gru"]
        hidden = np.maximum(np.concatenate([seen, h_H, s_LS[t]]) @ encoder["hidden"] + encoder["hidden_bias"], 0)
        out = hidden @ encoder["out"] + encoder["out_bias"]
        mu_Z, log_sigma_Z = out[:Z], np.clip(out[Z:], -5, 2)
        hidden = np.maximum(np.concatenate([seen, h_H, z_Z]) @ switch["hidden"] + switch["hidden_bias"], 0)
        logit = (hidden @ switch["out"] + switch["out_bias"])[0]
        if config.gate == "sigmoid":
            beta = sigmoid(logit)
        else:
            beta = sigmoid((logit + gate_L[t]) / config.gate_temperature)
        if config.gate == "straight_through":
            beta = float(beta > 0.5)
        if forced_beta is not None:
            beta = forced_beta
        if binary:
            beta = float(beta >= 0.5)
        if t == 0:
            beta = 1.0
        z_Z = beta * (mu_Z + np.exp(log_sigma_Z) * noise_LZ[t]) + (1 - beta) * z_Z
        from_input, from_state = seen @ gru["input"] + gru["bias"], h_H @ gru["state"]
        reset = sigmoid(from_input[:H] + from_state[:H])
        keep = sigmoid(from_input[H : 2 * H] + from_state[H : 2 * H])
        h_H = keep * h_H + (1 - keep) * np.tanh(from_input[2 * H :] + reset * from_state[2 * H :])
        trace.append((z_Z, beta, mu_Z, log_sigma_Z))
    return [np.array(x) for x in zip(*trace, strict=True)]


@pytest.mark.parametrize(
    ("gate", "options"),
    [
        ("sigmoid", {}),
        ("gumbel", {}),
        ("sigmoid", {"binary": True}),
        ("straight_through", {"gate_noise": False, "deterministic": True}),
        ("sigmoid", {"forced_beta": 0.3}),
    ],
)
def test_unroll_against_the_equations(params, gate, options):
    config = MetacontrollerConfig(**{**vars(CONFIG), "gate": gate})
    out = unroll(config, params, **options)
    k_z, k_gate = jax.random.split(jax.random.key(SEED))
    noise_BLZ = np.float64(jax.random.normal(k_z, (B, L, Z))) * (not options.get("deterministic", False))
    gate_BL = np.float64(jax.random.logistic(k_gate, (B, L))) * options.get("gate_noise", True)
    flags = {name: options[name] for name in ("forced_beta", "binary") if name in options}
    s_BLS = embed(CONFIG, params)
    tolerance = {"rtol": 1e-4, "atol": 1e-5}
    for b in range(B):
        inputs = (np.float64(x[b]) for x in (E_BLD, s_BLS, noise_BLZ, gate_BL))
        z, beta, mu, log_sigma = reference(params, config, *inputs, **flags)
        np.testing.assert_allclose(out.mu_BLZ[b], mu, **tolerance)
        np.testing.assert_allclose(out.log_sigma_BLZ[b], log_sigma, **tolerance)
        np.testing.assert_allclose(out.beta_BL[b], beta, **tolerance)
        np.testing.assert_allclose(out.z_BLZ[b], z, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(out.kl_BL[b], kl(mu, log_sigma), rtol=1e-4)
    assert out.log_sigma_BLZ.max() == 2
    assert (out.beta_BL[:, 0] == 1).all()
    if options.get("binary") or gate == "straight_through":
        assert set(np.unique(out.beta_BL)) == {0, 1}


def test_gates_by_hand():
    logit, noise = jnp.array([-2.0, 0.1, 0.3, 1.0]), jnp.array([0.5, -0.05, -0.5, 0.25])
    plain, soft = sigmoid(np.float64(logit)), sigmoid(np.float64(logit + noise) / 0.7)
    for gate, expected, slope in (
        ("sigmoid", plain, plain * (1 - plain)),
        ("gumbel", soft, soft * (1 - soft) / 0.7),
        ("straight_through", soft > 0.5, soft * (1 - soft) / 0.7),
    ):
        config = MetacontrollerConfig(gate=gate, gate_temperature=0.7)
        beta, pull_back = jax.vjp(lambda logit, config=config: metacontroller.relax(config, logit, noise), logit)
        np.testing.assert_allclose(beta, expected, rtol=1e-5)
        np.testing.assert_allclose(pull_back(jnp.ones(4))[0], slope, rtol=1e-5)
    assert 0.5 < soft[1] < 0.55


def test_kl_is_that_of_the_proposals_to_a_standard_normal(params):
    """Also the reference that the equations above are tested with, in every setting of the gate."""
    out = unroll(CONFIG, params)
    for b, t in ((0, 0), (1, 3)):
        total = 0.0
        for mean, log_sigma in zip(out.mu_BLZ[b, t], out.log_sigma_BLZ[b, t], strict=True):
            mu, sigma = float(mean), float(np.exp(log_sigma))

            def integrand(x, mu=mu, sigma=sigma):
                return norm.pdf(x, mu, sigma) * (norm.logpdf(x, mu, sigma) - norm.logpdf(x))

            total += quad(integrand, mu - 12 * sigma, mu + 12 * sigma)[0]
        np.testing.assert_allclose(out.kl_BL[b, t], total, rtol=1e-4)
        np.testing.assert_allclose(kl(np.float64(out.mu_BLZ[b, t]), np.float64(out.log_sigma_BLZ[b, t])), total)


def test_the_edited_stream_teaches_every_part(params):
    @jax.jit
    def grads(params):
        def total(params):
            out = metacontroller.unroll(params, CONFIG, jax.random.key(SEED), E_BLD, VALID_BL)
            return metacontroller.control(params, E_BLD, out.z_BLZ).sum()

        return jax.grad(total)(params)

    for path, leaf in jax.tree.leaves_with_path(grads(params)):
        assert np.isfinite(leaf).all(), jax.tree_util.keystr(path)
        assert np.abs(leaf).max() > 0, jax.tree_util.keystr(path)


# What each part may see


def test_the_switching_unit_sees_the_future_only_through_the_code(params):
    @jax.jit
    def influence(params):
        def betas(e_LD):
            options = {"deterministic": True, "gate_noise": False}
            return metacontroller.unroll(
                params, CONFIG, jax.random.key(SEED), e_LD[None], VALID_BL[:1], **options
            ).beta_BL[0]

        return jnp.abs(jax.jacrev(betas)(E_BLD[0])).max(-1)

    after_LL = np.triu_indices(L, 1)
    seen_LL = np.asarray(influence(params))
    assert (seen_LL[0] == 0).all()  # the first gate is open whatever happens
    assert (seen_LL[1, 2:] > 0).all()  # the code before it knows the future
    # An encoder that ignores the summary makes codes without a future.
    encoder = {**params["encoder"], "hidden": params["encoder"]["hidden"].at[D + H :].set(0)}
    seen_LL = np.asarray(influence({**params, "encoder": encoder}))
    assert (seen_LL[after_LL] == 0).all()
    assert (seen_LL[1:][np.tril_indices(L - 1, 0, L)] > 0).all()


def test_a_view_is_what_the_encoder_reads_and_the_gate_does_not(params):
    view_BLD = jnp.flip(E_BLD, axis=0) - 0.5
    alone, other = unroll(CONFIG, params), unroll(CONFIG, params, view_BLD)
    for one, two in zip(unroll(CONFIG, params, view_BLD=E_BLD), alone, strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-4, atol=1e-5)
    mixed = unroll(CONFIG, params, view_BLD=view_BLD)
    for name in ("mu_BLZ", "log_sigma_BLZ", "kl_BL"):
        np.testing.assert_allclose(getattr(mixed, name), getattr(other, name), rtol=1e-6)
    h_BH, z_BZ = jnp.zeros((B, H)), mixed.z_BLZ[:, 0]
    for t in range(1, L):
        h_BH = metacontroller.history_step(params, E_BLD[:, t - 1], h_BH)
        beta_B = jax.nn.sigmoid(metacontroller.switch_logit(params, E_BLD[:, t], h_BH, z_BZ))
        np.testing.assert_allclose(mixed.beta_BL[:, t], beta_B, rtol=1e-5)
        z_BZ = mixed.z_BLZ[:, t]
    assert np.abs(mixed.beta_BL - other.beta_BL).max() > 0.01


@pytest.mark.parametrize("config", [CONFIG, SUFFIX], ids=lambda config: config.embedder)
def test_what_the_embedder_sees(params, config):
    """Derivative of s_t by e_t': of the whole sequence, or of its suffix; never of the padding."""

    def first(e_LD):
        return metacontroller.embed(params, config, e_LD[None], VALID_BL[1:])[0]

    seen_LL = np.abs(jax.jit(jax.jacrev(first))(E_BLD[1])).max((1, 3))
    length = 4
    assert (seen_LL[:length, length:] == 0).all()
    if config.embedder == "summary":
        assert (seen_LL[:length, :length] > 0).all()
        s_BLS = embed(config, params)
        np.testing.assert_array_equal(s_BLS, jnp.broadcast_to(s_BLS[:, :1], s_BLS.shape))
    else:
        assert (seen_LL[:length, :length] > 0).tolist() == np.triu(np.ones((length, length), bool)).tolist()


@pytest.mark.parametrize("config", [CONFIG, SUFFIX], ids=lambda config: config.embedder)
def test_the_embedding_is_that_of_the_sequence_without_its_padding(params, config):
    """All else that `unroll` computes is causal: the equations hold in a sequence with padding and one without."""
    length = 4

    @jax.jit
    def readers(params, x_1LD):
        both = params["embedder"], jnp.stack([x_1LD, x_1LD[:, ::-1]])
        return jax.vmap(lambda p, x: backbone.apply(p, config.embedder_config, x)[0]["summary"][0])(*both)

    x_LD = jnp.stack([jnp.asarray(normalise(np.float64(e_D)), jnp.float32) for e_D in E_BLD[1, :length]])
    forward_LS, backward_LS = readers(params, x_LD[None])
    if config.embedder == "summary":
        expected_LS = np.tile(forward_LS[-1] + backward_LS[-1], (length, 1))
    else:
        expected_LS = backward_LS[::-1]
    for filling in (0.0, 9.0):
        s_BLS = embed(config, params, jnp.where(VALID_BL[..., None], E_BLD, filling))
        np.testing.assert_allclose(s_BLS[1, :length], expected_LS, rtol=1e-4, atol=1e-5)


# The step form, which reinforcement learning uses


def test_the_step_form_agrees_with_the_parallel_form(params):
    out = unroll(CONFIG, params)

    @jax.jit
    def by_steps(params, z_BLZ):
        def step(carry, inputs):
            h_BH, z_before_BZ = carry
            e_BD, z_BZ = inputs
            beta_B = jax.nn.sigmoid(metacontroller.switch_logit(params, e_BD, h_BH, z_before_BZ))
            controlled_BD = metacontroller.control(params, e_BD, z_BZ)
            return (metacontroller.history_step(params, e_BD, h_BH), z_BZ), (h_BH, beta_B, controlled_BD)

        start = jnp.zeros((B, H)), jnp.zeros((B, Z))
        inputs = jnp.swapaxes(E_BLD, 0, 1), jnp.swapaxes(z_BLZ, 0, 1)
        return jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), jax.lax.scan(step, start, inputs)[1])

    h_BLH, beta_BL, controlled_BLD = by_steps(params, out.z_BLZ)
    np.testing.assert_allclose(
        h_BLH, jax.jit(metacontroller.history, static_argnums=1)(params, CONFIG, E_BLD), atol=1e-5
    )
    np.testing.assert_allclose(beta_BL[:, 1:], out.beta_BL[:, 1:], rtol=1e-4, atol=1e-6)
    parallel_BLD = jax.jit(metacontroller.control)(params, E_BLD, out.z_BLZ)
    np.testing.assert_allclose(controlled_BLD, parallel_BLD, rtol=1e-4, atol=1e-5)


def test_the_controller_of_a_code(params):
    z_BLZ = jnp.asarray(np.random.default_rng(3).standard_normal((B, L, Z)), jnp.float32)
    down, up = jax.jit(metacontroller.decode)(params, z_BLZ)
    assert (down.shape, up.shape) == ((B, L, R, D), (B, L, D, R))
    p = jax.tree.map(np.float64, params["decoder"])
    hidden = np.maximum(np.float64(z_BLZ[1, 2]) @ p["hidden"] + p["hidden_bias"], 0)
    expected_down = p["down_bias"] + sum(h * w for h, w in zip(hidden, p["down"], strict=True))
    expected_up = p["up_bias"] + sum(h * w for h, w in zip(hidden, p["up"], strict=True))
    np.testing.assert_allclose(down[1, 2], expected_down, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(up[1, 2], expected_up, rtol=1e-4, atol=1e-5)
    control = jax.jit(metacontroller.control)
    e_D = np.float64(E_BLD[1, 2])
    edited = e_D + expected_up @ (expected_down @ e_D)
    np.testing.assert_allclose(control(params, E_BLD, z_BLZ)[1, 2], edited, rtol=1e-4, atol=1e-5)
    silent = {**params["decoder"], "up": jnp.zeros_like(p["up"]), "up_bias": jnp.zeros((D, R))}
    np.testing.assert_array_equal(control({**params, "decoder": silent}, E_BLD, z_BLZ), E_BLD)


# The rest


def test_the_start_is_what_the_config_says():
    config = MetacontrollerConfig(**{**vars(CONFIG), "gate_bias": -3.0, "initial_log_sigma": -1.5})

    @jax.jit
    def biases(key):
        params = metacontroller.init(key, config)
        return params["encoder"]["out_bias"], params["switch"]["out_bias"], params["decoder"]["up_bias"]

    encoder, switch, up = biases(jax.random.key(0))
    np.testing.assert_array_equal(encoder, [0] * Z + [-1.5] * Z)
    np.testing.assert_array_equal(switch, [-3])
    assert not up.any()


def test_the_linen_module_is_the_pure_function(params):
    module = Metacontroller(CONFIG)
    keys = {"params": jax.random.key(1), "latent": jax.random.key(2)}
    shapes = jax.eval_shape(module.init, keys, E_BLD, VALID_BL)["params"]["metacontroller"]
    assert jax.tree.map(jnp.shape, shapes) == jax.tree.map(jnp.shape, params)
    variables = {"params": {"metacontroller": params}}
    edited, out = jax.jit(module.apply)(variables, E_BLD, VALID_BL, rngs={"latent": jax.random.key(2)})
    np.testing.assert_allclose(edited, jax.jit(metacontroller.control)(params, E_BLD, out.z_BLZ), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(out.mu_BLZ, unroll(CONFIG, params).mu_BLZ, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rank": 0}, "sizes must be positive"),
        ({"embedder": "both"}, "embedder is 'both', expected one of"),
        ({"gate": "hard"}, "gate is 'hard', expected one of"),
        ({"gate_temperature": 0.0}, "gate_temperature is 0.0, expected > 0"),
    ],
)
def test_a_bad_config_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        MetacontrollerConfig(**arguments)
