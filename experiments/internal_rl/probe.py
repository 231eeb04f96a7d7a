"""Stage 2: linear probes of the hidden subgoal at every layer of every snapshot (C.2; Figs. 3 and A1)."""

import jax
import jax.numpy as jnp
import numpy as np

from experiments.internal_rl.config import Config
from experiments.internal_rl.pretrain import Snapshots, sampler
from experiments.runner import RunDirectory, train_chunks
from seqmod import backbone, train
from seqmod.mixers.base import Params, rms_norm
from seqmod.objectives import categorical_nll, masked_mean


def probe(run: RunDirectory, config: Config, models: Snapshots) -> dict[str, np.ndarray]:
    """Train the probes. Returns, on held-out demonstrations and after S snapshots and N layers:

    `accuracy_SN`; `accuracy_NL` and `belief_NL` of the last snapshot by steps since the subgoal began (the probability
    given to the true subgoal); `chance` (a constant guess) and `ceiling_L` (NaN where no step is that far).
    """
    if run.is_done("probe"):
        return run.stage_results("probe")[1]
    settings, width = config.probe, config.world.subgoal_colours
    snapshots, layers, subgoals = len(models), config.model.layers + 1, config.world.subgoals
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *models.values())
    tx = settings.optimiser.make()

    def read(obs_BLF: jax.Array) -> jax.Array:
        """Normalised residual streams (S, N, B, L, D)."""
        taps = jax.vmap(lambda params: jnp.stack(backbone.apply(params, config.model, obs_BLF)[1]))(stacked)
        return rms_norm(jnp.ones(config.base.width), taps)

    def logits(probes: Params, e_SNBLD: jax.Array) -> jax.Array:
        return jnp.einsum("SNBLD,SNDG->SNBLG", e_SNBLD, probes["kernel"]) + probes["bias"][:, :, None, None]

    def loss(probes, demos, key, step):
        labels_BL = demos.target_BL // width
        nll = categorical_nll(
            logits(probes, read(demos.obs_BLF)), jnp.broadcast_to(labels_BL, (snapshots, layers, *labels_BL.shape))
        )
        return masked_mean(nll, jnp.broadcast_to(demos.valid_BL, nll.shape)) * snapshots * layers, {}

    steps = settings.optimiser.steps
    per_call = min(steps, 50)
    chunk = train.make_chunk(sampler(config, settings.optimiser.batch), loss, tx, per_call)
    probes = {
        "kernel": jnp.zeros((snapshots, layers, config.base.width, subgoals)),
        "bias": jnp.zeros((snapshots, layers, subgoals)),
    }
    key = jax.random.fold_in(jax.random.key(config.seed), 2)
    state = train.start(probes, tx, key)
    state, _ = train_chunks(
        run,
        "probe",
        state,
        chunk,
        max(1, steps // per_call),
        units_per_chunk=per_call,
        unit="steps",
        config={},
        checkpoint_every=4,
    )

    @jax.jit
    def evaluate(probes, key):
        demos = sampler(config, 256)(key)
        label_BL = demos.target_BL // width
        belief = jax.nn.softmax(logits(probes, read(demos.obs_BLF)))
        label_SNBL = jnp.broadcast_to(label_BL, belief.shape[:-1])
        right = (belief.argmax(-1) == label_SNBL) & demos.valid_BL[None, None]
        true_belief = jnp.take_along_axis(belief, label_SNBL[..., None], axis=-1)[..., 0]
        new_BL = jnp.concatenate([jnp.ones((len(label_BL), 1), bool), label_BL[:, 1:] != label_BL[:, :-1]], axis=1)
        time_BL = jnp.arange(label_BL.shape[1])[None]
        since_BL = time_BL - jax.lax.cummax(jnp.where(new_BL, time_BL, 0), axis=1)
        by_age_LBL = (since_BL[None] == jnp.arange(config.world.window)[:, None, None]) & demos.valid_BL[None]
        counts_L = by_age_LBL.sum((1, 2))
        shares_G = jnp.array([((label_BL == g) & demos.valid_BL).sum() for g in range(subgoals)])
        return {
            "accuracy_SN": right.sum((2, 3)) / demos.valid_BL.sum(),
            "accuracy_NL": jnp.einsum("LBT,NBT->NL", by_age_LBL.astype(float), right[-1].astype(float))
            / counts_L[None],
            "belief_NL": jnp.einsum("LBT,NBT->NL", by_age_LBL.astype(float), true_belief[-1]) / counts_L[None],
            "counts_L": counts_L,
            "chance": shares_G.max() / demos.valid_BL.sum(),
        }

    arrays = {name: np.asarray(value) for name, value in evaluate(state.params, jax.random.fold_in(key, 1)).items()}
    run.stage_done("probe", {"accuracy": arrays["accuracy_SN"].tolist(), "trained": list(models)}, arrays)
    return arrays
