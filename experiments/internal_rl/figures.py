"""Figures of the internal-RL experiment, each a function of what its stage measured."""

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.plotting import COLORS, figure, line_with_band, save

LABELS = {"internal": "internal RL", "forced": "internal RL, gate always open", "raw": "raw-action RL"}


def probe_figure(path: Path, arrays: Mapping[str, np.ndarray], snapshots: Sequence[str]) -> Path:
    """Probe accuracy by layer and training (Fig. A1) and belief in the true subgoal over time (Fig. 3)."""
    fig, axes = figure(1, 2)
    left, right = axes[0]
    accuracy_SN = arrays["accuracy_SN"]
    for index, (name, accuracy_N) in enumerate(zip(snapshots, accuracy_SN, strict=True)):
        shade = 0.25 + 0.75 * (index + 1) / len(snapshots)
        left.plot(accuracy_N, marker="o", color=COLORS[0], alpha=shade, label=name)
    left.axhline(float(arrays["chance"]), color="0.5", linestyle=":", label="most frequent subgoal")
    left.set(xlabel="layer of the residual stream", ylabel="probe accuracy", title="Which subgoal is being pursued?")
    left.set_xticks(range(accuracy_SN.shape[1]))
    seen = arrays["counts_L"] >= 100
    for layer, belief_L in enumerate(arrays["belief_NL"]):
        shade = 0.25 + 0.75 * (layer + 1) / len(arrays["belief_NL"])
        right.plot(np.flatnonzero(seen), belief_L[seen], color=COLORS[1], alpha=shade, label=f"layer {layer}")
    right.set(xlabel="steps since the subgoal began", ylabel="belief in the true subgoal", title="Belief sharpens")
    return save(fig, path)


def control_figure(path: Path, measured: Mapping[str, Any], layer: int) -> Path:
    """Success of true-subgoal controllers by controlled layer (Fig. 4)."""
    fig, axes = figure(1, 1)
    ax = axes[0, 0]
    layers = np.arange(len(measured["success_by_layer"]))
    ax.bar(layers - 0.2, measured["pretraining_success_by_layer"], 0.4, color=COLORS[5], label="pretraining tasks")
    ax.bar(layers + 0.2, measured["success_by_layer"], 0.4, color=COLORS[0], label="post-training task")
    ax.set(xlabel="controlled layer", ylabel="success rate", xticks=layers, ylim=(0, 1))
    ax.set_title(f"Linear controllers (internal RL acts at layer {layer})")
    return save(fig, path)


def gate_figure(
    path: Path, beta_BL: np.ndarray, subgoal_BL: np.ndarray, valid_BL: np.ndarray, episodes: int = 4
) -> Path:
    """The gate over time in a few held-out demonstrations, true subgoals as coloured bands (Fig. 6)."""
    fig, axes = figure(episodes, 1, width=7.0, height=1.3)
    chosen = np.flatnonzero(valid_BL[:, 0])[:episodes]
    for ax, episode in zip(axes[:, 0], chosen, strict=False):
        steps = int(valid_BL[episode].sum())
        subgoals, beta = subgoal_BL[episode, :steps], beta_BL[episode, :steps]
        starts = [0, *(np.flatnonzero(subgoals[1:] != subgoals[:-1]) + 1), steps]
        for first, last in itertools.pairwise(starts):
            subgoal = int(subgoals[first])
            ax.axvspan(first - 0.5, last - 0.5, color=COLORS[subgoal % len(COLORS)], alpha=0.25, linewidth=0)
            ax.text((first + last - 1) / 2, 1.08, str(subgoal), ha="center", va="bottom", fontsize=8)
        ax.bar(np.arange(steps), beta, 0.8, color="0.15")
        ax.set(xlim=(-0.5, valid_BL.shape[1] - 0.5), ylim=(0, 1.05), yticks=[0, 1], ylabel="gate")
    axes[-1, 0].set_xlabel("step; bands: the expert's subgoal")
    return save(fig, path)


def sweep_figure(path: Path, results: Mapping[str, Any], chosen: float) -> Path:
    """The KL sweep: rate against distortion, switch scores, and number of switches (Figs. 7, A3)."""
    fig, axes = figure(1, 3)
    rows = results["rows"]
    alphas = [row["alpha"] for row in rows]
    rate, scores, ratio = axes[0]
    rate.plot([row["kl"] for row in rows], [row["action_nll"] for row in rows], marker="o")
    for row in rows:
        rate.annotate(
            f"{row['alpha']:g}", (row["kl"], row["action_nll"]), textcoords="offset points", xytext=(5, 4), fontsize=8
        )
    rate.axhline(results["base_nll"], color="0.5", linestyle=":", label="base model alone")
    rate.set(xlabel="rate: KL per step [nats]", ylabel="distortion: action NLL [nats]", title="Rate and distortion")
    for name in ("precision", "recall", "f1"):
        scores.plot(alphas, [row["within_one"][name] for row in rows], marker="o", label=name)
    scores.axhline(results["random"]["within_one"]["f1"], color="0.5", linestyle=":", label="F1 of a random gate")
    scores.axhline(results["always_open"]["within_one"]["f1"], color="0.5", linestyle="--", label="F1 of an open gate")
    scores.axvline(chosen, color="0.8", zorder=0)
    scores.set(ylim=(0, 1.02), title="Switches within one step")
    ratio.plot(alphas, [row["exact"]["ratio"] for row in rows], marker="o")
    ratio.axhspan(0.75, 1.33, color=COLORS[2], alpha=0.2, label="0.75 to 1.33")
    ratio.axvline(chosen, color="0.8", zorder=0)
    most = max(2.0, *(row["exact"]["ratio"] for row in rows))
    ratio.set(ylim=(0, 1.1 * most), title="Switches per true switch")
    least = min((alpha for alpha in alphas if alpha > 0), default=1.0)
    for ax in (scores, ratio):
        ax.set_xscale("symlog", linthresh=least)  # a weight of 0 has its place too
        ax.set(xlabel="KL weight", xlim=(min(0.7 * min(alphas), 0.5 * least), 1.5 * max(alphas)))
        ax.set_xticks(alphas, [f"{alpha:g}" for alpha in alphas])
        ax.minorticks_off()
    return save(fig, path)


def reinforcement_figure(
    path: Path, success: Mapping[str, np.ndarray], episodes_per_update: int, ceiling: float, window: int = 8
) -> Path:
    """Success against episodes, median and quartiles over seeds, linear and logarithmic (Figs. 8, A5)."""
    fig, axes = figure(1, 2, width=5.0, height=3.4)
    for ax, scale in zip(axes[0], ("linear", "log"), strict=True):
        for (learner, success_SU), color in zip(success.items(), COLORS, strict=False):
            width = max(1, min(window, success_SU.shape[1] // 4))
            smooth = np.stack([np.convolve(run, np.ones(width) / width, "valid") for run in success_SU])
            episodes = (np.arange(smooth.shape[1]) + width) * episodes_per_update
            floor = 0.0 if scale == "linear" else 0.5 / (width * episodes_per_update)
            line_with_band(ax, episodes, np.maximum(smooth, floor), LABELS[learner], color)
        ax.axhline(ceiling, color="0.4", linestyle=":", label="true-subgoal controllers, best layer")
        ax.set(xlabel="episodes", ylabel="success rate", yscale=scale)
    axes[0, 0].set_ylim(0, 1)
    return save(fig, path)
