"""What a representation holds: probes read a label from it, interchange interventions ask whether the model uses it.

A probe is softmax regression on taps, linear or through one hidden ReLU layer, fitted to a whole set of examples at
once by L-BFGS: with its L2 penalty the linear probe has one optimum, so that its score says something of the
representation and nothing of a learning rate.

An interchange intervention cuts a model at a representation h = lower(x) into a bijection phi's coordinates. Each
node j of a causal hypothesis owns a block of them; for a set of chosen nodes

    z = phi(lower(base)),  z[block_j] <- phi(lower(source_j))[block_j] for each chosen j,  logits = upper(phi^-1(z))

and the label is what the hypothesis says of `base` with node j set to its value on source_j. Distributed alignment
search trains phi alone for those labels; the share that it gets right is the interchange intervention accuracy
(Geiger et al., arXiv 2303.02536; Sutter et al., arXiv 2507.08802). A bijection strong enough aligns nearly anything: a
high accuracy alone proves nothing, so compare with a linear one, with an untrained model and with a wrong hypothesis.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from seqmod import backbone, bijections, train
from seqmod.mixers.base import Params, scaled_normal
from seqmod.objectives import categorical_nll, masked_mean

# Probes


@dataclass(frozen=True)
class ProbeConfig:
    """`width` D in, `classes` out, through `hidden` units if not 0. `penalty` times half the squared kernels is added
    to the mean loss; the fit ends after `steps`, or when no gradient is above `tolerance`."""

    width: int
    classes: int
    hidden: int = 0
    penalty: float = 1e-3
    steps: int = 200
    tolerance: float = 1e-5

    def __post_init__(self) -> None:
        if self.width < 1 or self.classes < 2 or self.hidden < 0 or self.steps < 1:
            raise ValueError(
                f"ProbeConfig: width {self.width} and steps {self.steps} must be at least 1, classes {self.classes} "
                f"at least 2 and hidden {self.hidden} at least 0"
            )
        if self.penalty < 0 or self.tolerance < 0:
            raise ValueError(f"ProbeConfig: penalty {self.penalty} and tolerance {self.tolerance} must not be negative")


class Examples(NamedTuple):
    """Representations h (..., D), integer labels (...) and which of them count, `valid` (...); all if None."""

    h: jax.Array
    labels: jax.Array
    valid: jax.Array | None = None


def _flat(config: ProbeConfig, examples: Examples) -> tuple[jax.Array, jax.Array, jax.Array]:
    shape = examples.h.shape
    valid = jnp.ones(shape[:-1], bool) if examples.valid is None else examples.valid
    if shape[-1] != config.width or examples.labels.shape != shape[:-1] or valid.shape != shape[:-1]:
        raise ValueError(
            f"Examples: h, labels and valid have shapes {shape}, {examples.labels.shape} and {valid.shape}, "
            f"expected (..., {config.width}), (...) and (...)"
        )
    return examples.h.reshape(-1, config.width).astype(jnp.float32), examples.labels.reshape(-1), valid.reshape(-1)


def init_probe(key: jax.Array, config: ProbeConfig) -> Params:
    """Parameters: `mean`, `scale` (D,), which `fit_probe` sets, and the kernels and biases of one layer or two."""
    D, F, G = config.width, config.hidden, config.classes
    hidden = {"up": scaled_normal(key, (D, F), D, 2.0), "up_bias": jnp.zeros(F)} if F else {}
    return {
        "mean": jnp.zeros(D),
        "scale": jnp.ones(D),
        **hidden,
        "kernel": jnp.zeros((F or D, G)),
        "bias": jnp.zeros(G),
    }


def probe_logits(params: Params, config: ProbeConfig, h: jax.Array) -> jax.Array:
    """Logits (..., classes) of h (..., D)."""

    def row(name: str) -> jax.Array:
        return params[name].reshape((1,) * (h.ndim - 1) + (-1,))

    x = (h.astype(jnp.float32) - row("mean")) / row("scale")
    if config.hidden:
        x = jax.nn.relu(x @ params["up"] + row("up_bias"))
    return x @ params["kernel"] + row("bias")


def probe_scores(params: Params, config: ProbeConfig, examples: Examples) -> dict[str, jax.Array]:
    """`accuracy`, and `nats`, the mean negative log-likelihood of the labels; scalars."""
    h_ND, label_N, valid_N = _flat(config, examples)
    logits_NG = probe_logits(params, config, h_ND)
    right_N = (logits_NG.argmax(-1) == label_N).astype(jnp.float32)
    return {
        "accuracy": masked_mean(right_N, valid_N),
        "nats": masked_mean(categorical_nll(logits_NG, label_N), valid_N),
    }


def fit_probe(key: jax.Array, config: ProbeConfig, examples: Examples) -> tuple[Params, dict[str, jax.Array]]:
    """A probe fitted to `examples`, whose features it standardises, and how the fit went: the penalised `loss`, the
    largest entry of its `gradient` and the `steps` taken. Score it on examples of its own with `probe_scores`."""
    h_ND, label_N, valid_N = _flat(config, examples)
    weights_ND = jnp.broadcast_to(valid_N[:, None], h_ND.shape)
    mean_D = jax.vmap(masked_mean, (1, 1))(h_ND, weights_ND)
    deviation_D = jnp.sqrt(jax.vmap(masked_mean, (1, 1))(jnp.square(h_ND - mean_D[None]), weights_ND))
    # A feature that varies by no more than its mean is rounded would be noise, blown up.
    scale_D = jnp.where(deviation_D > 1e-6 * jnp.abs(mean_D), deviation_D, 1.0)
    params = {**init_probe(key, config), "mean": mean_D, "scale": scale_D}
    statistics, weights = _part(params, ("mean", "scale"))

    def loss(weights: Params) -> jax.Array:
        nll_N = categorical_nll(probe_logits({**statistics, **weights}, config, h_ND), label_N)
        kernels = [weights[name] for name in ("kernel", "up") if name in weights]
        return masked_mean(nll_N, valid_N) + config.penalty / 2 * sum(jnp.square(kernel).sum() for kernel in kernels)

    tx = optax.lbfgs()
    value_and_grad = optax.value_and_grad_from_state(loss)

    def largest(grads: Params) -> jax.Array:
        return jnp.stack([jnp.abs(grad).max() for grad in jax.tree.leaves(grads)]).max()

    def go_on(carry: Any) -> jax.Array:
        _, _, grads, count = carry
        return (count < config.steps) & (largest(grads) > config.tolerance)

    def update(carry: Any) -> Any:
        weights, state, _, count = carry
        value, grads = value_and_grad(weights, state=state)
        updates, state = tx.update(grads, state, weights, value=value, grad=grads, value_fn=loss)
        weights = optax.apply_updates(weights, updates)
        return weights, state, optax.tree.get(state, "grad"), count + 1

    carry = weights, tx.init(weights), jax.grad(loss)(weights), jnp.zeros((), jnp.int32)
    weights, _, grads, count = jax.lax.while_loop(go_on, update, carry)
    report = {"loss": loss(weights), "gradient": largest(grads), "steps": count}
    return {**statistics, **weights}, report


def _part(params: Params, names: Sequence[str]) -> tuple[Params, Params]:
    inside = {name: value for name, value in params.items() if name in names}
    return inside, {name: value for name, value in params.items() if name not in names}


def probe_taps(
    key: jax.Array,
    config: ProbeConfig,
    taps: Sequence[jax.Array],
    labels_BL: jax.Array,
    valid_BL: jax.Array | None,
    held_out_taps: Sequence[jax.Array],
    held_out_labels_BL: jax.Array,
    held_out_valid_BL: jax.Array | None,
) -> tuple[Params, dict[str, jax.Array]]:
    """One probe for each of S taps (B, L, D), as `backbone.apply` returns them, all for the same labels.

    Returns parameters with a leading axis S, and `accuracy`, `nats` on the held-out examples (`train_...` on those of
    the fit) and the report of `fit_probe`, each (S,).
    """

    def one(key: jax.Array, h: jax.Array, held_out: jax.Array) -> tuple[Params, dict[str, jax.Array]]:
        examples = Examples(h, labels_BL, valid_BL)
        params, report = fit_probe(key, config, examples)
        seen = {f"train_{name}": value for name, value in probe_scores(params, config, examples).items()}
        scores = probe_scores(params, config, Examples(held_out, held_out_labels_BL, held_out_valid_BL))
        return params, {**scores, **seen, **report}

    return jax.jit(jax.vmap(one))(jax.random.split(key, len(taps)), jnp.stack(taps), jnp.stack(held_out_taps))


# Interchange interventions


class Halves(NamedTuple):
    """A model cut in two: `lower` takes inputs to representations (B, ..., D), `upper` those to logits (B, ..., A)."""

    lower: Callable[[Any], jax.Array]
    upper: Callable[[jax.Array], jax.Array]


def backbone_halves(
    params: Params, config: backbone.BackboneConfig, layer: int, head: str, position: int | None = None
) -> Halves:
    """A backbone cut at a layer of its residual stream; logits of one head, at one step if `position` is given."""
    config.check_layer(layer)
    if head not in dict(config.heads):
        raise ValueError(f"backbone_halves: head is {head!r}, expected one of {sorted(dict(config.heads))}")

    def upper(e_BLD: jax.Array) -> jax.Array:
        logits = backbone.upper(params, config, e_BLD, layer)[head]
        return logits if position is None else logits[:, position]

    return Halves(lambda x_BLF: backbone.lower(params, config, x_BLF, layer), upper)


@dataclass(frozen=True)
class AlignmentConfig:
    """`bijection` of the representation, and the coordinates that each node owns: `blocks[j]` those of node j."""

    bijection: bijections.BijectionConfig
    blocks: tuple[tuple[int, ...], ...]

    def __post_init__(self) -> None:
        owned = [coordinate for block in self.blocks for coordinate in block]
        width = self.bijection.width
        if not self.blocks or not all(self.blocks):
            raise ValueError(f"AlignmentConfig: blocks are {self.blocks}, expected at least one, none of them empty")
        if len(set(owned)) != len(owned):
            raise ValueError(f"AlignmentConfig: blocks {self.blocks} share a coordinate, expected disjoint ones")
        if not set(owned) <= set(range(width)):
            raise ValueError(f"AlignmentConfig: blocks {self.blocks} leave the coordinates 0 to {width - 1}")

    @property
    def masks_ND(self) -> np.ndarray:
        """Which coordinates are which node's."""
        return np.array([np.isin(np.arange(self.bijection.width), block) for block in self.blocks])


class Interventions(NamedTuple):
    """A batch: `base` inputs; `sources` of the N nodes, with a leading axis N; `chosen_NB` nodes; counterfactual
    `labels`, integers of the shape of the logits but for the last axis. Only steps where `where` is true are intervened
    on (all axes of the representation but the last, or the last of those), and only labels where `valid` count."""

    base: Any
    sources: Any
    chosen_NB: jax.Array
    labels: jax.Array
    where: jax.Array | None = None
    valid: jax.Array | None = None


def interchange(
    params: Params,
    config: AlignmentConfig,
    halves: Halves,
    base: Any,
    sources: Any,
    chosen_NB: jax.Array,
    where: jax.Array | None = None,
) -> jax.Array:
    """Logits of the model on `base` with the blocks of the chosen nodes taken from `sources`, as in `Interventions`.

    Nothing is differentiated through `lower`. ValueError where the number of nodes or the batch is another.
    """
    h, source_h = jax.lax.stop_gradient((halves.lower(base), jax.vmap(halves.lower)(sources)))
    nodes = len(config.blocks)
    if source_h.shape != (nodes, *h.shape) or chosen_NB.shape != (nodes, len(h)):
        raise ValueError(
            f"interchange: base, sources and chosen_NB have representations {h.shape}, {source_h.shape} and shape "
            f"{chosen_NB.shape}, expected (B, ..., D), (N, B, ..., D) and (N, B) with N = {nodes}"
        )
    z = bijections.forward(params, config.bijection, h)
    source_z = bijections.forward(params, config.bijection, source_h)
    for node, mask_D in enumerate(config.masks_ND):
        inner = (1,) * (h.ndim - 2)
        use = chosen_NB[node].reshape(-1, *inner, 1) & mask_D.reshape(1, *inner, -1)
        z = jnp.where(use, source_z[node], z)
    changed = bijections.inverse(params, config.bijection, z).astype(h.dtype)
    if where is not None:
        changed = jnp.where(jnp.broadcast_to(where, h.shape[:-1])[..., None], changed, h)
    return halves.upper(changed)


def interchange_scores(
    params: Params, config: AlignmentConfig, halves: Halves, batch: Interventions
) -> dict[str, jax.Array]:
    """`loss`, the mean cross-entropy of the counterfactual labels in nats, and `accuracy`; scalars."""
    logits = interchange(params, config, halves, batch.base, batch.sources, batch.chosen_NB, batch.where)
    valid = jnp.ones(batch.labels.shape, bool) if batch.valid is None else batch.valid
    right = (logits.argmax(-1) == batch.labels).astype(jnp.float32)
    nll = categorical_nll(logits.astype(jnp.float32), batch.labels)
    return {"loss": masked_mean(nll, valid), "accuracy": masked_mean(right, valid)}


def interchange_accuracy(params: Params, config: AlignmentConfig, halves: Halves, batch: Interventions) -> jax.Array:
    """Interchange intervention accuracy (IIA): the share of counterfactual labels that the model then gives."""
    return interchange_scores(params, config, halves, batch)["accuracy"]


def fit_alignment(
    key: jax.Array,
    config: AlignmentConfig,
    halves: Halves,
    sample: Callable[[jax.Array], Interventions],
    optimiser: train.AdamWConfig,
) -> tuple[Params, dict[str, jax.Array]]:
    """Distributed alignment search: trains the bijection, and nothing else, on `sample(key)` of each step.

    Returns its parameters and the curves `loss` and `accuracy`, (steps,). `optimiser.batch` is not used: that is up to
    `sample`.
    One compiled program; `vmap` over keys, or over models in `halves`, gives many at once.
    """

    def loss(params, batch, key, step):
        scores = interchange_scores(params, config, halves, batch)
        return scores["loss"], {"accuracy": scores["accuracy"]}

    k_init, k_train = jax.random.split(key)
    tx = optimiser.make()
    state = train.start(bijections.init(k_init, config.bijection), tx, k_train)
    state, curves = train.make_chunk(sample, loss, tx, optimiser.steps)(state)
    return state.params, curves
