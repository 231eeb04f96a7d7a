"""The experiment from end to end on its tiny preset, and what its models see."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.hiss import __main__ as hiss
from experiments.hiss.models import Size, model

pytestmark = pytest.mark.usefixtures("quick_compile")


def test_the_tiny_preset_runs_and_resumes(tmp_path, capsys):
    arguments = ["--preset", "tiny", "--out", str(tmp_path / "run")]
    result = hiss.main(arguments)
    assert [np.shape(row["error"]) for row in result["measured"]["rows"]] == [(2, 2), (2, 2)]
    assert len(result["claims"]) == 2
    stored = json.loads((tmp_path / "run" / "result.json").read_text())
    assert stored["holds"] == result["holds"]
    assert (tmp_path / "run" / "report.html").stat().st_size > 10_000
    capsys.readouterr()
    assert hiss.main([*arguments, "--resume"])["measured"] == result["measured"]


@pytest.mark.parametrize(("name", "seen"), [("rglru", 10), ("rglru:first", 6), ("rglru/rglru", 10)])
def test_the_last_sample_that_a_prediction_depends_on(name, seen):
    """With 5 samples a chunk, the prediction of the second chunk (of 3) depends on samples up to the end, or the start,
    of that chunk."""
    own = model(name, Size(layers=1, width=4, mlp=4, heads=2), 3, 2, factor=5, steps=3)
    params = own.init(jax.random.key(0))
    x_BLF = jax.random.normal(jax.random.key(1), (1, 15, 3))
    gradient_OBLF = jax.jacobian(lambda x: own.predict(params, x)[0, 1])(x_BLF)
    moved_L = np.abs(gradient_OBLF).sum((0, 1, 3)) > 0
    assert moved_L[:seen].all()
    assert not moved_L[seen:].any()


def test_the_error_is_that_of_the_definition():
    config = hiss.TINY
    batch = hiss.sensors.draw(jax.random.key(0), 3, config.steps, config.sensors)

    class Constant:
        """Predicts the first sensor's mean of each chunk, twice."""

        def predict(self, params, x_BLF):
            return jnp.repeat(x_BLF[..., :1].reshape(3, config.steps, 10, 1).mean(2), 2, axis=-1)

    x = np.float64(batch.still_BLF) + 0.5 * np.float64(batch.vibration_BLF)
    guess_BT = x[..., 0].reshape(3, config.steps, 10).mean(2)
    expected = np.mean((guess_BT[..., None] - np.float64(batch.target_BTO)) ** 2)
    np.testing.assert_allclose(hiss.mean_squared_error(Constant(), {}, batch, 0.5), expected, rtol=1e-5)


def test_bad_settings_are_refused(capsys):
    for arguments, message in (
        (["--models", "mamba3"], "mixer 'mamba3' is unknown"),
        (["--models", "s4d/s4d:first"], "expected MIXER, MIXER:first or LOW/HIGH"),
        (["--chunk", "7"], "chunk is 7, expected a divisor of 400 steps"),
    ):
        with pytest.raises(SystemExit):
            hiss.main(arguments)
        assert message in capsys.readouterr().err
