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
    """KL weight at a step of training: `alpha_start`, held, then risen linearly to `alpha`."""
    settings, total = config.discover, config.discover.optimiser.steps
    risen = jnp.clip((step - settings.hold * total) / max(settings.ramp * total, 1.0), 0.0, 1.0)
    return settings.alpha_start + (alpha - settings.alpha_start) * risen


def trainer(
    config: Config, model: Params, steps: int, *, forced: bool = False
) -> tuple[Callable[[train.TrainState], tuple[train.TrainState, Any]], train.TrainState, int]:
    """The compiled training function of `steps` steps, its initial state, and the tokens a call takes from the expert.

    `forced` trains the paper's baseline instead, whose gate is always open, at the chosen weight only.
    """
    settings, shape, layer = config.discover, config.model, config.layer
    alphas = jnp.array([settings.chosen] if forced else settings.alphas)
    tx = settings.optimiser.make()
    base_sample = sampler(config, settings.optimiser.batch)
    turn = jax.vmap(jax.vmap(config.world.env.turn, in_axes=(0, None)))

    def sample(key):
        k_demos, k_turn = jax.random.split(key)
        demos = base_sample(k_demos)
        e_BLD = backbone.lower(model, shape, demos.obs_BLF, layer)
        if not settings.turned_view:
            return demos, e_BLD, None
        symmetry_B = jax.random.randint(k_turn, (settings.optimiser.batch,), 0, 8)
        return demos, e_BLD, backbone.lower(model, shape, turn(demos.obs_BLF, symmetry_B), shape.layers)

    def loss(params, batch, key, step, alpha):
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
        nll = action_nll(config, backbone.upper(model, shape, edited_BLD, layer), demos)
        kl = masked_mean(out.kl_BL, demos.valid_BL)
        beta = masked_mean(out.beta_BL, demos.valid_BL)
        return nll + alpha_at(config, alpha, step) * kl, {"action_nll": nll, "kl": kl, "beta": beta}

    k_init, k_train = jax.random.split(jax.random.fold_in(jax.random.key(config.seed), 4))
    params = metacontroller.init(k_init, settings.metacontroller)
    stacked = jax.tree.map(lambda leaf: jnp.repeat(leaf[None], len(alphas), axis=0), params)
    chunk = train.make_chunk(sample, loss, tx, steps, hyper=alphas)
    tokens = steps * settings.optimiser.batch * config.world.window
    return chunk, train.start(stacked, tx, k_train, sweep=True), tokens


def discover(run: RunDirectory, config: Config, model: Params, *, forced: bool = False) -> Params:
    """Train one metacontroller for each KL weight, on the same demonstrations. Returns their parameters, stacked."""
    steps = config.discover.optimiser.steps
    per_call = min(steps, 100)
    chunk, state, _ = trainer(config, model, per_call, forced=forced)
    state, _ = train_chunks(
        run,
        "discover-forced" if forced else "discover",
        state,
        chunk,
        max(1, steps // per_call),
        units_per_chunk=per_call,
        unit="steps",
        config={"forced": forced},
        checkpoint_every=4,
    )
    return state.params


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
        demos = sampler(config, settings.held_out)(jax.random.fold_in(jax.random.key(config.seed), 5))
        e_BLD = backbone.lower(model, shape, demos.obs_BLF, layer)
        return demos, e_BLD, action_nll(config, backbone.upper(model, shape, e_BLD, layer), demos)

    demos, e_BLD, base_nll = held_out(model)

    @jax.jit
    def gate(params, model, demos, e_BLD):
        def run_gate(binary: bool):
            key = jax.random.key(0)
            out = metacontroller.unroll(
                params, settings.metacontroller, key, e_BLD, demos.valid_BL, gate_noise=False, binary=binary
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
        beta_BL, numbers = gate(pick(stacked, index), model, demos, e_BLD)
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
