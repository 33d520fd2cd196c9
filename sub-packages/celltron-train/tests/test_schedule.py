import pytest

from celltron.train.schedule import ScheduleConfig, learning_rate


def rates(config: ScheduleConfig, max_steps: int) -> list[float]:
    return [learning_rate(config, step, max_steps) for step in range(1, max_steps + 1)]


def test_warm_up_is_linear_and_reaches_the_highest_rate() -> None:
    config = ScheduleConfig(learning_rate=0.4, warmup_steps=4, decay="constant")
    assert rates(config, 6) == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.4, 0.4])


def test_cosine() -> None:
    config = ScheduleConfig(learning_rate=1.0, minimum_learning_rate=0.2)
    # 0.2 + 0.8 (1 + cos(pi k / 4)) / 2
    assert rates(config, 4) == pytest.approx([1.0, 0.88284271247, 0.6, 0.31715728753])


def test_linear() -> None:
    config = ScheduleConfig(learning_rate=1.0, minimum_learning_rate=0.2, decay="linear")
    assert rates(config, 4) == pytest.approx([1.0, 0.8, 0.6, 0.4])


@pytest.mark.parametrize("decay", ["cosine", "linear"])
def test_hold_stays_at_the_minimum(decay: str) -> None:
    config = ScheduleConfig(learning_rate=1.0, minimum_learning_rate=0.1, warmup_steps=2, hold_steps=3, decay=decay)
    found = rates(config, 9)
    assert found[1:3] == [1.0, 1.0]
    assert found[3] < 1.0 and found[5] > 0.1
    assert found[6:] == pytest.approx([0.1] * 3)


def test_warm_up_and_hold_may_fill_the_run() -> None:
    config = ScheduleConfig(learning_rate=1.0, minimum_learning_rate=0.5, warmup_steps=2, hold_steps=2)
    config.check_length(4)
    assert rates(config, 4) == pytest.approx([0.5, 1.0, 0.5, 0.5])
    with pytest.raises(ValueError, match=r"warmup_steps 2 \+ schedule.hold_steps 2 is more than loop.max_steps \(3\)"):
        config.check_length(3)


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"learning_rate": 0.0}, "schedule.learning_rate is 0.0"),
        ({"learning_rate": 1e-3, "minimum_learning_rate": 1e-2}, "schedule.minimum_learning_rate is 0.01"),
        ({"minimum_learning_rate": -1e-3}, "schedule.minimum_learning_rate is -0.001"),
        ({"warmup_steps": -1}, "schedule.warmup_steps is -1"),
        ({"hold_steps": -1}, "schedule.hold_steps is -1"),
    ],
)
def test_impossible_settings_are_named(values: dict[str, float], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        ScheduleConfig(**values)
