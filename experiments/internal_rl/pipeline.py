"""The stages in order, what each one needs from those before, and the report at the end."""

from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np

from experiments.internal_rl import codes, control, discover, figures, pretrain, probe, reinforce, show
from experiments.internal_rl.config import Config
from experiments.report import Claim, Figure, Section, SideBySide, Table, write_report
from experiments.runner import RunDirectory, RunError
from seqmod.checkpoint import differences, export_params, load_params
from seqmod.mixers.base import Params

Stage = Literal["pretrain", "probe", "control", "discover", "reinforce"]
STAGES: tuple[Stage, ...] = get_args(Stage)


def base_models(run: RunDirectory, config: Config, *, from_scratch: bool) -> pretrain.Snapshots:
    """The base model's snapshots: those of this run, the shipped ones if they fit, or freshly trained ones."""
    kept = run.path / "base.npz"
    if kept.exists():
        return pretrain.load_base(kept, config)
    if not from_scratch and pretrain.SHIPPED.exists():
        _, stored = load_params(pretrain.SHIPPED)
        if not differences(stored["made_by"], pretrain.what_makes_a_base(config)):
            print(f"pretrain: starting from the shipped base model {pretrain.SHIPPED.name}")
            models = pretrain.load_base(pretrain.SHIPPED, config)
            pretrain.save_base(kept, config, models)
            return models
        print("pretrain: the shipped base model is of another configuration; training one")
    return pretrain.pretrain(run, config)


def metacontrollers(run: RunDirectory, config: Config, model: Params, *, forced: bool = False) -> Params:
    """The sweep's metacontrollers (or the forced one), stacked: those of this run, or freshly trained ones."""
    kept = run.path / ("metacontroller_forced.npz" if forced else "metacontrollers.npz")
    if kept.exists():
        return jax.tree.map(jnp.asarray, load_params(kept)[0])
    stacked = discover.discover(run, config, model, forced=forced)
    export_params(kept, stacked, {"alphas": list(config.discover.alphas)})
    return stacked


def run_stages(
    run: RunDirectory, config: Config, stages: tuple[Stage, ...], *, from_scratch: bool = False
) -> dict[str, Any]:
    """Run the given stages in order, then write result.json and report.html from all that is done."""
    if "reinforce" in stages and "discover" not in stages and not (run.path / "metacontrollers.npz").exists():
        raise RunError("stage reinforce needs stage discover, which this run has not done: add it to --stages")
    models = base_models(run, config, from_scratch=from_scratch)
    model = models[1.0]
    if "probe" in stages:
        accuracy_N = probe.probe(run, config, models)["accuracy_SN"][-1]
        print("probe: subgoal accuracy by layer " + " ".join(f"{accuracy:.2f}" for accuracy in accuracy_N))
    if "control" in stages:
        measured = control.control(run, config, model)
        success = " ".join(f"{rate:.2f}" for rate in measured["success_by_layer"])
        print(f"control: post-training success by layer {success}; base alone {measured['raw_success']:.1e}")
    if "discover" in stages:
        stacked = metacontrollers(run, config, model)
        results, _ = discover.measure(run, config, model, stacked)
        for row in results["rows"]:
            print(
                f"discover: KL weight {row['alpha']:g}: NLL {row['action_nll']:.3f}, F1 {row['exact']['f1']:.2f}, "
                f"{row['exact']['ratio']:.2f} switches per true switch"
            )
        if not run.is_done("codes"):
            key = jax.random.fold_in(jax.random.key(config.seed), 10)
            run.stage_done("codes", codes.measure(config, model, chosen_metacontroller(config, stacked), key))
    if "reinforce" in stages:
        learn(run, config, model)
    return conclude(run, config)


def chosen_metacontroller(config: Config, stacked: Params) -> Params:
    """The metacontroller of the chosen KL weight."""
    return pretrain.pick(stacked, config.discover.alphas.index(config.discover.chosen))


def learn(run: RunDirectory, config: Config, model: Params) -> None:
    """All learners of the reinforcement stage, and an episode before and after."""
    if run.is_done("reinforce"):
        return
    chosen = chosen_metacontroller(config, metacontrollers(run, config, model))
    success: dict[str, np.ndarray] = {}
    metrics, policies = reinforce.reinforce(run, config, model, chosen, "internal")
    success["internal"], switches = metrics["success"], metrics["steps"]
    success["raw"] = reinforce.reinforce(run, config, model, None, "raw")[0]["success"]
    if config.reinforce.forced_baseline:
        always = pretrain.pick(metacontrollers(run, config, model, forced=True), 0)
        success["forced"] = reinforce.reinforce(run, config, model, always, "forced")[0]["success"]
    best = int(reinforce.final_success(success["internal"]).argmax())
    show.episodes(run, config, model, chosen, pretrain.pick(policies, best))
    finals = {learner: reinforce.final_success(values).tolist() for learner, values in success.items()}
    run.stage_done("reinforce", {"final": finals, "switches": float(switches[:, -1].mean())}, dict(success))


def conclude(run: RunDirectory, config: Config) -> dict[str, Any]:
    """result.json, figures and report.html from the stages that are done."""
    claims: list[Claim] = []
    sections: list[Section] = []
    measured: dict[str, Any] = {}
    if run.is_done("probe"):
        results, arrays = run.stage_results("probe")
        measured["probe_accuracy"] = results["accuracy"][-1]
        ends = {0.0: "untrained", 1.0: "trained"}
        names = [ends.get(share, f"{share:.0%} of training") for share in results["trained"]]
        image = figures.probe_figure(run.figure("probe.png"), arrays, names)
        best = max(results["accuracy"][-1])
        claims.append(
            Claim(
                "The residual stream encodes the hidden subgoal, most at mid depth and beyond",
                f"linear probe: {best:.2f} at the best layer, {results['accuracy'][-1][0]:.2f} at the embedding, "
                f"{float(arrays['chance']):.2f} by guessing",
                best > results["accuracy"][-1][0] + 0.1,
            )
        )
        sections.append(Section("Belief in the hidden subgoal", [Figure(image, "Held-out demonstrations.")]))
    ceiling = None
    if run.is_done("control"):
        results, _ = run.stage_results("control")
        measured["control"] = results
        ceiling, here = results["ceiling"], results["success_by_layer"][config.layer]
        image = figures.control_figure(run.figure("control.png"), results, config.layer)
        claims.append(
            Claim(
                "A linear edit of the residual stream makes the frozen model pursue a chosen subgoal, also after "
                "transitions that no demonstration has",
                f"post-training task solved in {here:.2f} of episodes with true-subgoal controllers at layer "
                f"{config.layer}, in {ceiling:.2f} at the best layer, in {results['raw_success']:.1e} without",
                here > 0.5 and results["raw_success"] <= 1e-4,
            )
        )
        sections.append(Section("Supervised controllers", [Figure(image)]))
    if run.is_done("gate"):
        results, arrays = run.stage_results("gate")
        index = config.discover.alphas.index(config.discover.chosen)
        row = results["rows"][index]
        measured["gate"] = results
        score = row["within_one"] if results["steps_per_subgoal"] >= 8 else row["exact"]
        claims.append(
            Claim(
                "Without labels, the gate opens where the subgoal changes, and only there",
                f"F1 {row['exact']['f1']:.2f} exact and {row['within_one']['f1']:.2f} within one step; "
                f"{row['exact']['ratio']:.2f} switches per true switch (random gate "
                f"{results['random']['within_one']['f1']:.2f}, open gate "
                f"{results['always_open']['within_one']['f1']:.2f} within one step)",
                score["f1"] >= 0.8 and 0.75 <= row["exact"]["ratio"] <= 1.33,
            )
        )
        gate = figures.gate_figure(
            run.figure("gate.png"), arrays["beta_ABL"][index], arrays["subgoal_BL"], arrays["valid_BL"]
        )
        sweep = figures.sweep_figure(run.figure("sweep.png"), results, config.discover.chosen)
        columns = [
            "KL weight",
            "NLL",
            "NLL, binary gate",
            "KL per step",
            "quasi-binary",
            "F1",
            "F1 within one",
            "ratio",
        ]
        names = ("action_nll", "binary_nll", "kl", "quasi_binary")
        rows = [
            [r["alpha"], *(r[name] for name in names), r["exact"]["f1"], r["within_one"]["f1"], r["exact"]["ratio"]]
            for r in results["rows"]
        ]
        table = Table(columns, rows, f"The base model alone has an NLL of {results['base_nll']:.3f}.")
        caption = f"Gate at KL weight {config.discover.chosen:g}, held-out demonstrations."
        sections.append(Section("Temporal abstraction", [Figure(gate, caption), Figure(sweep), table]))
    if run.is_done("codes"):
        results, _ = run.stage_results("codes")
        measured["codes"] = results
        most, of_nats = results["at_most"], f"at most {results['at_most']:.2f}"
        if run.is_done("control"):
            most = measured["control"]["held_information"]
            of_nats = f"of true-subgoal controllers {most:.2f}"
        claims.append(
            Claim(
                "A code names a subgoal: held in fresh layouts, it leads to the same colour",
                f"information of random code and first colour {results['information']:.2f} nats, {of_nats} "
                f"({results['by_sampling']:.3f} by sampling alone)",
                results["information"] >= 0.5 * most,
            )
        )
    if run.is_done("reinforce"):
        results, success = run.stage_results("reinforce")
        finals = {learner: np.array(values) for learner, values in results["final"].items()}
        measured["final_success"] = results["final"]
        internal, raw = float(np.median(finals["internal"])), float(np.median(finals["raw"]))
        honest = 1.0 if ceiling is None else ceiling
        of = "no ceiling measured" if ceiling is None else f"true-subgoal controllers at their best layer {honest:.2f}"
        claims.append(
            Claim(
                "Internal RL solves the task; raw-action RL with as many episodes does not",
                f"median success {internal:.2f} against {raw:.1e} ({len(finals['internal'])} seeds, "
                f"{success['internal'].shape[1] * config.reinforce.grpo.batch:,} episodes each; "
                f"{of})",
                honest >= 0.1 and internal >= 0.8 * honest and raw <= 0.1 * honest,
            )
        )
        image = figures.reinforcement_figure(
            run.figure("reinforcement.png"), success, config.reinforce.grpo.batch, honest
        )
        blocks: list[Any] = [Figure(image, "Median and quartiles over seeds.")]
        before, after = run.figure("before.gif"), run.figure("after.gif")
        if before.exists() and after.exists():
            blocks.append(SideBySide([Figure(before, "Before: the base model."), Figure(after, "After internal RL.")]))
        sections.append(Section("Reinforcement learning", blocks))
    result = {
        "claim": "Internal RL on discovered codes solves a sparse-reward task that raw-action RL does not",
        "measured": measured,
        "holds": bool(claims) and all(claim.holds for claim in claims) and run.is_done("reinforce"),
        "seeds": config.reinforce.seeds,
        "spread": {
            learner: np.quantile(values, [0.25, 0.5, 0.75]).tolist()
            for learner, values in measured.get("final_success", {}).items()
        },
        "claims": [{"claim": c.claim, "measured": c.measured, "holds": c.holds} for c in claims],
    }
    run.write_result(result)
    summary = (
        "A sequence model is trained on demonstrations whose goals are hidden. A metacontroller finds codes in its "
        "residual stream that are held for a whole subgoal, and reinforcement learning acts on those codes only. "
        f"World: {config.world.size} x {config.world.size} cells, {config.world.colours} colours, "
        f"post-training task {config.world.post_training}."
    )
    report = write_report(run.path / "report.html", "Internal RL", summary, claims, sections)
    for claim in claims:
        print(f"[{'holds' if claim.holds else 'does not hold'}] {claim.claim}: {claim.measured}")
    print(f"report: {report}")
    return result
