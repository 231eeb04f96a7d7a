"""Settings of the internal-RL experiment: the presets, and clear refusals before anything is compiled."""

import dataclasses
import itertools

import jax
import numpy as np
import pytest

from experiments.internal_rl.__main__ import parse
from experiments.internal_rl.config import Config, Discover, World
from experiments.internal_rl.discover import alpha_at
from experiments.internal_rl.presets import PRESETS, paper, small, tiny
from experiments.internal_rl.pretrain import SHIPPED, load_base, loss, sampler, save_base
from seqmod import backbone
from seqmod.checkpoint import CheckpointMismatch


def test_paper_preset_is_the_papers_setting():
    config = paper()
    assert config.model.inputs == 637
    assert len(config.world.pretraining_tasks) == 16
    assert config.world.unseen == {(0, 1), (1, 2), (2, 3), (3, 0)}
    assert config.world.subgoals == 4
    assert config.layer == config.model.layers // 2


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_no_pretraining_task_has_a_transition_of_the_post_training_task(name):
    world = PRESETS[name]().world
    post = world.split(world.post_training)
    unseen = set(itertools.pairwise(post))
    for task in world.pretraining_tasks:
        subgoals = world.split(task)
        assert not unseen & set(itertools.pairwise(subgoals))
        assert len(subgoals) < len(post)


def test_small_tasks_are_those_of_the_papers_ant_world():
    table_a2 = "032 103 210 321 020 021 031 102 131 132 202 203 213 310 313 320"
    assert set(small().world.pretraining_tasks) == set(table_a2.split())


def test_paper_preset_traces():
    config = paper()
    params = jax.eval_shape(lambda: backbone.init(jax.random.key(0), config.model))
    demos = jax.eval_shape(lambda: sampler(config, 3)(jax.random.key(0)))
    value, metrics = jax.eval_shape(lambda params, demos: loss(config, params, demos), params, demos)
    assert value.shape == ()
    assert set(metrics) == {"action_nll", "observation_nll"}
    weights = sum(leaf.size for leaf in jax.tree.leaves(params))
    assert 3_000_000 < weights < 4_500_000


def test_alpha_rises_geometrically_to_its_value():
    settings = dataclasses.replace(tiny().discover, learn_alpha=1e-4, ramp=0.5)
    config = dataclasses.replace(tiny(), discover=settings)
    steps = jax.numpy.array([0, 5, 10, 20])
    np.testing.assert_allclose(alpha_at(config, jax.numpy.array(0.01), steps), [1e-4, 1e-3, 1e-2, 1e-2], rtol=1e-5)


def test_without_a_ramp_alpha_is_constant():
    assert float(alpha_at(paper(), jax.numpy.array(0.0), jax.numpy.array(0))) == 0.0
    assert float(alpha_at(paper(), jax.numpy.array(0.17), jax.numpy.array(0))) == pytest.approx(0.17)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--world.post-training", "0129"], "names colour 9"),
        (["--world.size", "2"], "a grid of size 2 has 4"),
        (["--layer", "7"], "layer is 7, expected 0"),
        (["--base.mixer", "mystery"], "mixer 'mystery' is unknown"),
        (["--base.width", "24"], "expected base.width 24"),
        (["--world.pretraining", "012"], "withheld transitions"),
        (["--discover.chosen", "9"], "chosen is 9"),
        (["--discover.ramp", "2"], "ramp is 2"),
        (["--discover.learn-alpha", "0"], "weights above 0"),
        (["--discover.learn-steps", "-1"], "learn_steps is -1"),
    ],
)
def test_bad_settings_end_with_a_message(arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        parse(["--preset", "tiny", *arguments])
    assert stop.value.code == 2
    assert message in " ".join(capsys.readouterr().err.split()), "wrapped to the width of a terminal"


def test_flags_reach_the_configuration():
    preset, options = parse(["--preset", "tiny", "--seeds", "3", "--base.mixer", "rglru", "--seed", "5"])
    assert preset == "tiny"
    assert options.config.reinforce.seeds == 3
    assert options.config.base.mixer == "rglru"
    assert options.config.seed == 5


def test_base_model_of_another_configuration_is_refused(tmp_path):
    config = tiny()
    models = {share: backbone.init(jax.random.key(int(share)), config.model) for share in (0.0, 1.0)}
    save_base(tmp_path / "base.npz", config, models)
    loaded = load_base(tmp_path / "base.npz", config)
    assert list(loaded) == [0.0, 1.0]
    for share in models:
        for one, other in zip(jax.tree.leaves(models[share]), jax.tree.leaves(loaded[share]), strict=True):
            np.testing.assert_array_equal(one, other)
    wider = dataclasses.replace(config, world=dataclasses.replace(config.world, walls=2))
    with pytest.raises(CheckpointMismatch, match="walls"):
        load_base(tmp_path / "base.npz", wider)


def test_the_shipped_base_serves_every_post_training_task_over_its_demonstrations():
    config = small()
    assert set(load_base(SHIPPED, config)) == {0.0, *config.pretrain.snapshots, 1.0}
    longer = dataclasses.replace(config, world=dataclasses.replace(config.world, post_training="01230"))
    load_base(SHIPPED, longer)
    fewer = dataclasses.replace(config, world=dataclasses.replace(config.world, post_training="0213"))
    with pytest.raises(CheckpointMismatch, match="pretraining"):
        load_base(SHIPPED, fewer)


def test_subgoals_must_be_runs_of_colours():
    with pytest.raises(ValueError, match="does not consist of subgoals"):
        World(colours=4, subgoal_colours=2, post_training="0213", withheld=())


def test_chosen_weight_must_be_in_the_sweep():
    with pytest.raises(ValueError, match="expected one of alphas"):
        Discover(alphas=(0.1,), chosen=0.2)
    assert Config().discover.chosen in Config().discover.alphas
