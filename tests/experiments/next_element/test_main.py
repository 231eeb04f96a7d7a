"""The experiment from end to end on its tiny preset, and that what it calls regret is one."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.next_element import __main__ as next_element
from experiments.next_element import tasks


def test_the_tiny_preset_runs_and_resumes(tmp_path, capsys):
    arguments = ["--preset", "tiny", "--out", str(tmp_path / "run")]
    result = next_element.main(arguments)
    rows = {(row["mixer"], row["causal"]) for row in result["measured"]["rows"]}
    assert {("attention", True), ("rglru", True)} <= rows
    stored = json.loads((tmp_path / "run" / "result.json").read_text())
    assert stored["claims"][0]["holds"] == result["claims"][0]["holds"]
    assert (tmp_path / "run" / "report.html").stat().st_size > 10_000
    capsys.readouterr()
    again = next_element.main([*arguments, "--resume"])
    assert again["measured"] == result["measured"]


@pytest.mark.parametrize("causal", [True, False])
def test_the_ideal_observer_has_no_regret(causal, monkeypatch):
    """A model whose logits are the logarithms of the true probabilities, as far as the labels tell, has regret 0."""
    config = next_element.TINY
    batch = next_element.batches(causal, 64, 20, jax.random.key(0))
    for index in range(len(tasks.CAUSAL if causal else tasks.BIDIRECTIONAL)):
        own = jax.tree.map(lambda x, index=index: x[index], batch)
        p = jnp.clip(own.ideal_BL, 1e-6, 1 - 1e-6)[..., None]
        label = jax.nn.one_hot(own.labels_BL, tasks.VOCABULARY)
        # What is left over goes to the other tokens evenly: the labels' probabilities are the ideal observer's.
        logits = jnp.log(label * p + (1 - label) * (1 - p) / (tasks.VOCABULARY - 1))
        monkeypatch.setattr(next_element.backbone, "apply", lambda *_, logits=logits: ({"token": logits}, ()))
        measured = next_element.losses(config.model("attention", True), {}, own)
        np.testing.assert_allclose(measured["regret"], 0, atol=2e-5)


def test_bad_settings_are_refused(capsys):
    for arguments, message in (
        (["--mixers", "mamba3"], "mixer 'mamba3' is unknown"),
        (["--chunk", "7"], "chunk is 7, expected a divisor of 400 steps"),
    ):
        with pytest.raises(SystemExit):
            next_element.main(arguments)
        assert message in capsys.readouterr().err
