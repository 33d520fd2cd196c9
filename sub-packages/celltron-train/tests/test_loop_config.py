import pytest

from celltron.core import InputError
from celltron.train.loop_config import LoopConfig


def test_a_global_batch_must_be_dealt_to_processes() -> None:
    padded = LoopConfig(global_batch_size=24, micro_batch_size=4, packing=False)
    for data_parallel in (1, 2, 3, 6):
        padded.check_batches(data_parallel)
    with pytest.raises(InputError, match="loop.global_batch_size 24 is not .* 4 x 4 .* choose a multiple of 16"):
        padded.check_batches(4)
    packed = LoopConfig(global_batch_size=24, micro_batch_size=4)
    packed.check_batches(24)
    with pytest.raises(InputError, match="loop.global_batch_size 24 is less than the 25 data-parallel processes"):
        packed.check_batches(25)


@pytest.mark.parametrize(
    ("values", "named"),
    [({name: 0}, f"loop.{name} is 0") for name in ("max_steps", "global_batch_size", "micro_batch_size", "log_every")]
    + [
        ({name: -1}, f"loop.{name} is -1")
        for name in ("validate_every", "save_every", "keep_checkpoints", "keep_best", "keep_every", "seed")
    ]
    + [
        ({"max_skipped_steps": -1}, "loop.max_skipped_steps is -1"),
        ({"stop_seconds": 0.0}, "loop.stop_seconds is 0.0"),
        ({"stop_seconds": float("nan")}, "loop.stop_seconds is nan"),
        ({"stop_seconds": 1e9}, "loop.stop_seconds is 1000000000.0, .* at most 3600"),
        ({"keep_best": 1, "save_every": 10}, "loop.keep_best is 1, .* give loop.validate_every"),
        ({"keep_best": 1, "save_every": 10, "validate_every": 4}, "loop.keep_best is 1, .* a multiple of it"),
    ],
)
def test_impossible_settings_are_named(values: dict[str, float], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        LoopConfig(**values)
