"""The generated sensors: what is slow and what is fast in them, against their definition."""

import jax
import numpy as np
import pytest

from experiments.hiss import sensors
from experiments.hiss.sensors import SensorConfig

pytestmark = pytest.mark.usefixtures("quick_compile")
CONFIG = SensorConfig(factor=7)


def test_velocities_have_the_variance_and_memory_they_should():
    path_BTN = np.float64(sensors.wandering(jax.random.key(0), (3001, 11, 3), 5.0))
    np.testing.assert_allclose((path_BTN**2).mean((0, 2)), 1.0, atol=0.06)
    for lag in (1, 4):
        correlation = (path_BTN[:, lag:] * path_BTN[:, :-lag]).mean()
        np.testing.assert_allclose(correlation, np.exp(-lag / 5.0), atol=0.03)


def test_without_drift_and_noise_a_still_sensor_is_the_mixed_velocity():
    config = SensorConfig(factor=7, drift=0.0, noise=0.0)
    batch = sensors.draw(jax.random.key(1), 5, 11, config)
    expected_BTF = np.tanh(np.float64(batch.target_BTO) @ sensors.mixing(config).T)
    np.testing.assert_allclose(batch.samples(0.0), np.repeat(expected_BTF, 7, axis=1), atol=1e-6)


def test_vibration_is_a_sine_under_a_slow_amplitude():
    batch = sensors.draw(jax.random.key(2), 3, 40, SensorConfig(factor=25, memory=1e6))
    wave_BLF = np.float64(batch.vibration_BLF)
    # With a constant amplitude all power is at one frequency, within the range.
    power_BWF = np.abs(np.fft.rfft(wave_BLF * np.hanning(1000)[:, None], axis=1)) ** 2
    peak_BF = power_BWF.argmax(1)
    assert ((peak_BF / 1000 > 0.155) & (peak_BF / 1000 < 0.405)).all()
    assert len(np.unique(peak_BF)) > 6
    near = sum(np.take_along_axis(power_BWF, peak_BF[:, None] + shift, axis=1)[:, 0] for shift in range(-3, 4))
    np.testing.assert_array_less(0.99 * power_BWF.sum(1), near)


def test_drift_and_noise_have_their_sizes():
    config = SensorConfig(factor=7, drift=0.2, noise=0.5, sensors=3)
    with_both = sensors.draw(jax.random.key(3), 301, 9, config)
    with_none = sensors.draw(jax.random.key(3), 301, 9, SensorConfig(factor=7, drift=0.0, noise=0.0, sensors=3))
    rest_BLF = np.float64(with_both.still_BLF - with_none.still_BLF)
    expected_L = 0.2**2 * np.arange(1, 64) + 0.5**2
    np.testing.assert_allclose((rest_BLF**2).mean((0, 2)), expected_L, rtol=0.2)
    # Differences between samples: a step of drift, and two of noise.
    np.testing.assert_allclose(np.diff(rest_BLF, axis=1).var(), 0.2**2 + 2 * 0.5**2, rtol=0.03)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"factor": 0}, "must be at least 1"),
        ({"memory": 0.0}, "memory must be positive"),
        ({"frequencies": (0.4, 0.6)}, "expected 0 <= low <= high <= 0.5"),
    ],
)
def test_bad_settings_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        SensorConfig(**options)
