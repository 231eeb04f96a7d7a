"""Stage 4: train the metacontroller on the frozen base, for a sweep of KL weights at once (D.2; Figs. 6, A3, 7).

No subgoal label is used; labels serve only to measure, on held-out demonstrations, where the gate opens.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.internal_rl.config import Config
from experiments.internal_rl.pretrain import action_nll, pick, sampler
from experiments.runner import RunDirectory, train_chunks
from seqmod import backbone, metacontroller, train
from seqmod.mixers.base import Params
from seqmod.objectives import masked_mean


def alpha_at(config: Config, alpha: jax.Array, step: jax.Array) -> jax.Array:
    """KL weight at a step of the sweep: risen geometrically from `learn_alpha` to `alpha`, then constant."""
    settings = config.discover
    if not settings.ramp:
        return jnp.asarray(alpha)
    risen = jnp.clip(step / (settings.ramp * settings.optimiser.steps), 0.0, 1.0)
    return settings.learn_alpha * (alpha / settings.learn_alpha) ** risen


def _sampler(config: Config, model: Params, batch: int) -> train.Sample:
    """key -> (demonstrations, residual stream at the controlled layer, the encoder's view of it or None)."""
    shape, demonstrations = config.model, sampler(config, batch)
    turn = jax.vmap(jax.vmap(config.world.env.turn, in_axes=(0, None)))

    def sample(key):
        k_demos, k_turn = jax.random.split(key)
        demos = demonstrations(k_demos)
        e_BLD = backbone.lower(model, shape, demos.obs_BLF, config.layer)
        if not config.discover.turned_view:
            return demos, e_BLD, None
        symmetry_B = jax.random.randint(k_turn, (batch,), 0, 8)
        return demos, e_BLD, backbone.lower(model, shape, turn(demos.obs_BLF, symmetry_B), shape.layers)

    return sample


def _loss(config: Config, model: Params, alpha_of_step: Callable[..., Any], forced: bool) -> train.Loss:
    settings = config.discover

    def loss(params, batch, key, step, *alpha):
        demos, e_BLD, view_BLD = batch
        out = metacontroller.unroll(
            params,
            settings.metacontroller,
            key,
            e_BLD,
            demos.valid_BL,
            forced_beta=1.0 if forced else None,
            view_BLD=view_BLD,
        )
        edited_BLD = metacontroller.control(params, e_BLD, out.z_BLZ)
        nll = action_nll(config, backbone.upper(model, config.model, edited_BLD, config.layer), demos)
        kl = masked_mean(out.kl_BL, demos.valid_BL)
        beta = masked_mean(out.beta_BL, demos.valid_BL)
        return nll + alpha_of_step(step, *alpha) * kl, {"action_nll": nll, "kl": kl, "beta": beta}

    return loss


Training = tuple[Callable[[train.TrainState], tuple[train.TrainState, Any]], train.TrainState]
"""A compiled training function and its initial state."""


def learner(config: Config, model: Params, params: Params, steps: int, *, forced: bool = False) -> Training:
    """First phase: one metacontroller from `params` at the small KL weight, `steps` steps a call.

    `forced` trains the paper's baseline instead, whose gate is always open.
    """
    settings = config.discover
    tx = settings.learn_optimiser.make()
    loss = _loss(config, model, lambda step: settings.learn_alpha, forced)
    chunk = train.make_chunk(_sampler(config, model, settings.learn_batch), loss, tx, steps)
    return chunk, train.start(params, tx, jax.random.fold_in(jax.random.key(config.seed), 11))


def sweeper(config: Config, model: Params, params: Params, steps: int, *, forced: bool = False) -> Training:
    """Second phase: a metacontroller for each KL weight, all from `params`, `steps` steps a call.

    `forced` trains the paper's baseline at the chosen weight only.
    """
    settings = config.discover
    alphas = jnp.array([settings.chosen] if forced else settings.alphas)
    tx = settings.optimiser.make()
    loss = _loss(config, model, lambda step, alpha: alpha_at(config, alpha, step), forced)
    stacked = jax.tree.map(lambda leaf: jnp.repeat(leaf[None], len(alphas), axis=0), params)
    chunk = train.make_chunk(_sampler(config, model, settings.optimiser.batch), loss, tx, steps, hyper=alphas)
    return chunk, train.start(stacked, tx, jax.random.fold_in(jax.random.key(config.seed), 9), sweep=True)


def discover(run: RunDirectory, config: Config, model: Params, *, forced: bool = False) -> Params:
    """Train one metacontroller for each KL weight, on the same demonstrations. Returns their parameters, stacked."""
    settings = config.discover
    name = "discover-forced" if forced else "discover"

    def train_for(stage: str, training: Training, total: int, per_call: int) -> Params:
        chunk, state = training
        state, _ = train_chunks(
            run,
            stage,
            state,
            chunk,
            max(1, total // per_call),
            units_per_chunk=per_call,
            unit="steps",
            config={"forced": forced},
            checkpoint_every=4,
        )
        return state.params

    params = metacontroller.init(jax.random.fold_in(jax.random.key(config.seed), 4), settings.metacontroller)
    if settings.learn_steps:
        per_call = min(settings.learn_steps, 50)
        training = learner(config, model, params, per_call, forced=forced)
        params = train_for(f"{name}-learn", training, settings.learn_steps, per_call)
    per_call = min(settings.optimiser.steps, 100)
    training = sweeper(config, model, params, per_call, forced=forced)
    return train_for(name, training, settings.optimiser.steps, per_call)


def matched_switches(predicted: np.ndarray, true: np.ndarray, tolerance: int) -> int:
    """Largest number of one-to-one matches between two sorted lists of steps at most `tolerance` apart."""
    matches = index = 0
    for step in true:
        while index < len(predicted) and predicted[index] < step - tolerance:
            index += 1
        if index < len(predicted) and predicted[index] <= step + tolerance:
            matches, index = matches + 1, index + 1
    return matches


def switch_scores(
    open_BL: np.ndarray, subgoal_BL: np.ndarray, valid_BL: np.ndarray, tolerance: int
) -> dict[str, float]:
    """Precision, recall and F1 of gate openings against subgoal changes, and the ratio of their numbers.

    The first step is left out: the gate is open there by definition. Matches are one to one within `tolerance` steps.
    """
    true_BL = (subgoal_BL[:, 1:] != subgoal_BL[:, :-1]) & valid_BL[:, 1:]
    open_BL = open_BL[:, 1:] & valid_BL[:, 1:]
    matches = sum(
        matched_switches(np.flatnonzero(opened), np.flatnonzero(changed), tolerance)
        for opened, changed in zip(open_BL, true_BL, strict=True)
    )
    precision, recall = matches / max(open_BL.sum(), 1), matches / max(true_BL.sum(), 1)
    return {
        "precision": float(precision),
        "recall": float(recall),
        "f1": float(2 * precision * recall / max(precision + recall, 1e-9)),
        "ratio": float(open_BL.sum() / max(true_BL.sum(), 1)),
    }


def measure(
    run: RunDirectory, config: Config, model: Params, stacked: Params
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Rate, distortion and gate of every metacontroller on held-out demonstrations.

    Results: one row per KL weight with `action_nll` (soft gate), `binary_nll` (gate thresholded as in RL), `kl` per
    step, `quasi_binary` (share of gates outside [0.1, 0.9]) and scores `exact` and `within_one`; reference rows for an
    always-open gate and a random gate of the true rate; `base_nll`. Arrays: gates `beta_ABL`, `subgoal_BL`, `valid_BL`.
    """
    if run.is_done("gate"):
        return run.stage_results("gate")
    settings, shape, layer = config.discover, config.model, config.layer

    @jax.jit
    def held_out(model):
        key = jax.random.fold_in(jax.random.key(config.seed), 5)
        demos, e_BLD, view_BLD = _sampler(config, model, settings.held_out)(key)
        return demos, e_BLD, view_BLD, action_nll(config, backbone.upper(model, shape, e_BLD, layer), demos)

    demos, e_BLD, view_BLD, base_nll = held_out(model)

    @jax.jit
    def gate(params, model, demos, e_BLD, view_BLD):
        def run_gate(binary: bool):
            key = jax.random.key(0)
            out = metacontroller.unroll(
                params,
                settings.metacontroller,
                key,
                e_BLD,
                demos.valid_BL,
                gate_noise=False,
                binary=binary,
                view_BLD=view_BLD,
            )
            edited = metacontroller.control(params, e_BLD, out.z_BLZ)
            return out, action_nll(config, backbone.upper(model, shape, edited, layer), demos)

        soft, soft_nll = run_gate(False)
        _, binary_nll = run_gate(True)
        return soft.beta_BL, {
            "action_nll": soft_nll,
            "binary_nll": binary_nll,
            "kl": masked_mean(soft.kl_BL, demos.valid_BL),
        }

    subgoal_BL = np.asarray(demos.target_BL) // config.world.subgoal_colours
    valid_BL = np.asarray(demos.valid_BL)

    def scores(open_BL: np.ndarray) -> dict[str, Any]:
        return {
            "exact": switch_scores(open_BL, subgoal_BL, valid_BL, 0),
            "within_one": switch_scores(open_BL, subgoal_BL, valid_BL, 1),
        }

    rows, gates = [], []
    for index, alpha in enumerate(settings.alphas):
        beta_BL, numbers = gate(pick(stacked, index), model, demos, e_BLD, view_BLD)
        beta_BL = np.asarray(beta_BL)
        middle = ((beta_BL > 0.1) & (beta_BL < 0.9))[:, 1:][valid_BL[:, 1:]].mean()
        numbers = {name: float(value) for name, value in numbers.items()}
        rows.append({"alpha": alpha, **numbers, "quasi_binary": float(1 - middle), **scores(beta_BL >= 0.5)})
        gates.append(beta_BL)
    changes = ((subgoal_BL[:, 1:] != subgoal_BL[:, :-1]) & valid_BL[:, 1:]).sum()
    rate = changes / valid_BL[:, 1:].sum()
    results = {
        "rows": rows,
        "base_nll": float(base_nll),
        "always_open": scores(np.ones_like(valid_BL)),
        "random": scores(np.random.default_rng(config.seed).random(valid_BL.shape) < rate),
        "steps_per_subgoal": float(valid_BL.sum() / (changes + valid_BL[:, 0].sum())),
    }
    run.stage_done("gate", results, {"beta_ABL": np.stack(gates), "subgoal_BL": subgoal_BL, "valid_BL": valid_BL})
    return run.stage_results("gate")
