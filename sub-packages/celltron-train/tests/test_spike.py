import math

import numpy as np
import pytest

from celltron.core import InputError, build_config
from celltron.train.spike import FIRST_STEPS, Spike, SpikeConfig, SpikeDetector, SpikeState


def steps_noted(losses: list[float], config: SpikeConfig | None = None) -> list[int]:
    """Numbers, from 0, of the losses that are noted."""
    detector = SpikeDetector(config or SpikeConfig())
    return [step for step, loss in enumerate(losses) if detector.see(loss) is not None]


def falling(num_steps: int, *, noise: float, seed: int = 0) -> list[float]:
    """A loss that falls from 10 to 7 with normal noise."""
    generator = np.random.default_rng(seed)
    steps = np.arange(num_steps)
    return list(7.0 + 3.0 * np.exp(-steps / 50) + noise * generator.standard_normal(num_steps))


def test_the_limit_is_the_formula() -> None:
    state = SpikeState(losses=(5.0, 6.0, 4.0, 7.0, 5.0) * 4)  # median 5, distances 0 1 1 2 0: MAD 1
    detector = SpikeDetector(SpikeConfig(deviations=3.0), state)
    limit = 5.0 + 3.0 * 1.4826
    assert detector.see(limit) is None
    detector = SpikeDetector(SpikeConfig(deviations=3.0), state)
    spike = detector.see(math.nextafter(limit, 99.0))
    assert spike is not None
    assert (spike.median, spike.limit) == (5.0, limit)


def test_a_loss_that_hardly_varies_needs_a_rise() -> None:
    assert steps_noted([2.0] * 50 + [2.09]) == []
    assert steps_noted([2.0] * 50 + [2.11]) == [50]
    assert steps_noted([-2.0] * 50 + [-1.89]) == [50]


@pytest.mark.parametrize("seed", range(5))
def test_noise_and_a_falling_loss_are_no_spikes_and_a_spike_among_them_is(seed: int) -> None:
    losses = falling(600, noise=0.1, seed=seed)
    assert steps_noted(losses) == []
    losses[400] += 1.5
    assert steps_noted(losses) == [400]


def test_of_steps_that_stay_high_only_the_first_is_noted() -> None:
    losses = [3.0] * 60 + [9.0, 9.1, 9.2] + [3.0] * 5 + [9.0]
    assert steps_noted(losses) == [60, 68]


def test_a_loss_that_stays_high_becomes_the_new_median() -> None:
    losses = [3.0] * 100 + [9.0] * 100 + [9.2, 30.0]
    assert steps_noted(losses) == [100, 201]


def test_nothing_is_judged_before_there_are_enough_losses() -> None:
    assert steps_noted([1.0] * (FIRST_STEPS - 1) + [50.0]) == []
    assert steps_noted([1.0] * FIRST_STEPS + [50.0]) == [FIRST_STEPS]


def test_what_is_no_number_is_passed_over() -> None:
    state = SpikeState(losses=(1.0,) * 30)
    detector = SpikeDetector(SpikeConfig(), state)
    assert detector.see(math.nan) is None and detector.see(math.inf) is None
    assert detector.state == state


def test_a_window_of_none_notes_nothing() -> None:
    detector = SpikeDetector(SpikeConfig(window=0))
    assert all(detector.see(loss) is None for loss in [1.0] * 50 + [99.0])
    assert detector.state == SpikeState()


@pytest.mark.parametrize("num_seen", [90, 150, 151, 152])
def test_a_detector_goes_on_from_the_state_of_another(num_seen: int) -> None:
    losses = [*falling(150, noise=0.1), 15.0, 15.0, 3.0]
    first = SpikeDetector(SpikeConfig())
    noted = [first.see(loss) is not None for loss in losses[:num_seen]]
    assert len(first.state.losses) == min(num_seen, 100)
    second = SpikeDetector(SpikeConfig(), first.state)
    noted += [second.see(loss) is not None for loss in losses[num_seen:]]
    assert np.flatnonzero(noted).tolist() == steps_noted(losses) == [150]
    assert second.state == SpikeState(losses=tuple(losses[-100:]))


@pytest.mark.parametrize("losses", [(math.nan,), (1.0, math.inf), (1.0,) * 10_001], ids=["nan", "inf", "many"])
def test_a_state_that_cannot_be(losses: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="must be finite numbers, and at most 10,000"):
        SpikeState(losses=losses)


def test_a_note_names_the_cells() -> None:
    record = Spike(loss=9.0, median=3.0, limit=3.5).record(7, np.array([4, 2], dtype=np.int64))
    assert record == {
        "step": 7,
        "note": "loss spike",
        "spike_loss": 9.0,
        "median_loss": 3.0,
        "spike_limit": 3.5,
        "cells": [4, 2],
    }
    assert all(type(cell) is int for cell in record["cells"])


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"window": 5}, "must be 0, or from 20 to 10,000"),
        ({"window": 10**9}, "must be 0, or from 20 to 10,000"),
        ({"deviations": -1.0}, "negative"),
        ({"rise": -0.1}, "negative"),
    ],
)
def test_settings_that_cannot_be(values: dict[str, float], words: str) -> None:
    with pytest.raises(InputError, match=words):
        build_config(SpikeConfig, values)
