"""Every layout trains as one process does, from the same seed with no checkpoint in between.

`train_layouts.py` trains once under each layout, in one set of processes; the tests compare what it wrote down.
"""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pytest

PROGRAM = Path(__file__).with_name("train_layouts.py")
NUM_STEPS = 6
WORLD_SIZES = {
    "one": 1,
    "tp2": 2,
    "tp2_sp": 2,
    "pp2": 2,
    "dp2": 2,
    "dp2_zero": 2,
    "tp2_pp2": 4,
    "tp2_sp_pp2": 4,
    "one_packed": 1,
    "tp2_packed": 2,
    "tp2_sp_packed": 2,
    "pp2_packed": 2,
    "dp2_packed": 2,
    "cp2": 2,
    "cp2_packed": 2,
    "tp2_sp_cp2_packed": 4,
    "cp2_zero": 2,
    "fsdp3": 3,
    "tp2_sp_fsdp2": 4,
    "cp2_fsdp_full": 2,
    "one_pre_norm": 1,
    "tp2_sp_pp2_pre_norm": 4,
    "cp2_pp2_full_pre_norm": 4,
    "one_clipped": 1,
    "tp2_pp2_clipped": 4,
    "dp2_zero_clipped": 2,
    "one_fp32": 1,
    "tp2_fp32": 2,
    "dp2_zero_bf16": 2,
    "fsdp2_bf16": 2,
    "one_bf16": 1,
    "one_wide": 1,
    "tp2_sp_pp2_wide": 4,
    "one_dropout": 1,
    "one_dropout_selective": 1,
    "one_dropout_full": 1,
    "tp2_sp_full": 2,
    "dp2_overlap": 2,
    "dp2_zero_overlap": 2,
    "dp2_zero_late": 2,
    "tp2_dp2_dropout": 4,
    "tp2_sp_pp2_dropout": 4,
}
PACKED = ["one_packed", "tp2_packed", "tp2_sp_packed", "pp2_packed", "dp2_packed"]
CONTEXT = ["cp2", "cp2_packed", "tp2_sp_cp2_packed", "cp2_zero"]
EXACT = ["tp2", "tp2_sp", "pp2", "dp2", "dp2_zero", "tp2_pp2", "tp2_sp_pp2", "tp2_sp_full", "dp2_overlap"]
FULLY_SHARDED = ["fsdp3", "tp2_sp_fsdp2", "cp2_fsdp_full"]
EXACT += PACKED + CONTEXT + FULLY_SHARDED

# Sums of some thousand terms of size 1 in another order: 1e-16 each, and six Adam steps, which divide by the root of
# the gradient's own mean square, carry on what they are given.
FLOAT64 = 1e-12
# Megatron computes the norm in float32 whatever the gradients are: seven digits.
NORM = 5e-7


@dataclass(frozen=True)
class Run:
    """What the ranks of one layout wrote down."""

    folder: Path
    name: str

    @cached_property
    def ranks(self) -> list[dict[str, Any]]:
        """Each rank's facts; a rank that wrote none fails here."""
        files = [self.folder / f"{self.name}.{rank}" for rank in range(WORLD_SIZES[self.name])]
        return [
            json.loads(file.with_suffix(file.suffix + ".json").read_text())
            | {"arrays": dict(np.load(file.with_suffix(file.suffix + ".npz")))}
            for file in files
        ]

    @cached_property
    def records(self) -> list[dict[str, Any]]:
        lines = (self.folder / self.name / "metrics.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]

    def series(self, key: str) -> np.ndarray:
        """A key of the logged records, in order."""
        return np.array([record[key] for record in self.records if key in record])

    def whole(self, kind: str, step: int) -> dict[str, np.ndarray]:
        """The whole parameters, or their gradients, put together from all ranks' parts.

        Parts that several ranks hold must be the same bits on each: replicas of data parallelism, parameters that
        tensor-parallel ranks do not split, and the embedding that the first and the last stage share.
        """
        parts: dict[str, dict[tuple[int, ...], np.ndarray]] = {}
        shapes: dict[str, list[int]] = {}
        for rank in self.ranks:
            for name, part in rank["parts"].items():
                array = rank["arrays"][f"{step} {kind} {name}"]
                same = parts.setdefault(part["key"], {}).setdefault(tuple(part["offset"]), array)
                np.testing.assert_array_equal(same, array, err_msg=f"{self.name} {step} {kind} {name}")
                shapes[part["key"]] = part["shape"]
        return {key: join(parts[key], shapes[key]) for key in sorted(parts)}


def join(parts: dict[tuple[int, ...], np.ndarray], shape: list[int]) -> np.ndarray:
    """An array out of its parts, which must fill it."""
    whole = np.full(shape, np.nan)
    for offset, part in parts.items():
        whole[tuple(slice(start, start + size) for start, size in zip(offset, part.shape, strict=True))] = part
    assert not np.isnan(whole).any(), f"{len(parts)} parts leave holes in {shape}"
    return whole


def worst_difference(left: dict[str, np.ndarray], right: dict[str, np.ndarray]) -> tuple[float, str]:
    """The largest absolute difference and the array it is in."""
    assert left.keys() == right.keys()
    return max((float(np.abs(left[key] - right[key]).max()), key) for key in left)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, run_ranks: Callable[..., str]) -> dict[str, Run]:
    folder = tmp_path_factory.mktemp("layouts")
    run_ranks(PROGRAM, folder, *WORLD_SIZES, world_size=4, timeout_seconds=600)
    return {name: Run(folder, name) for name in WORLD_SIZES}


def test_micro_batches_differ_in_width_and_one_has_no_masked_place(runs: dict[str, Run]) -> None:
    (rank,) = runs["one"].ranks
    assert len(rank["widths"]) == 4 * NUM_STEPS
    assert min(rank["widths"]) == 2 and len(set(rank["widths"])) > 5
    assert 0 in rank["num_masked"]
    # The first of two replicas has a step without any.
    first_half = runs["dp2"].ranks[0]["num_masked"]
    assert first_half[4:6] == [0, 0] and sum(rank["num_masked"][8:12]) > 0
    # Under sequence parallelism widths are even.
    assert not any(width % 2 for width in runs["tp2_sp"].ranks[0]["widths"])


@pytest.mark.parametrize("name", PACKED)
def test_packed_micro_batches_hold_whole_cells_without_padding(runs: dict[str, Run], name: str) -> None:
    """They are other micro-batches than the padded ones that the losses and gradients below must equal."""
    padded, packed = runs["one"].ranks[0], runs[name].ranks[0]
    assert len(packed["widths"]) < len(padded["widths"]) and max(packed["widths"]) <= 64
    assert max(packed["widths"]) > 1.5 * max(padded["widths"])
    if name in ("one_packed", "tp2_packed", "pp2_packed"):
        assert sum(packed["widths"]) == packed["num_tokens"] < sum(2 * width for width in padded["widths"])


@pytest.mark.parametrize("name", CONTEXT)
def test_context_parallel_processes_hold_parts_of_like_size_of_the_same_rows(runs: dict[str, Run], name: str) -> None:
    (alone,) = runs["one" if name == "cp2" else "one_packed"].ranks
    left, right = ({rank["context_rank"]: rank for rank in runs[name].ranks}[place] for place in (0, 1))
    multiple = 4 if name == "tp2_sp_cp2_packed" else 2
    assert left["widths"] == right["widths"] == [-(-width // multiple) * multiple // 2 for width in alone["widths"]]
    assert any(left["num_masked"]) and any(right["num_masked"])
    assert [sum(both) for both in zip(left["num_masked"], right["num_masked"], strict=True)] == alone["num_masked"]


def test_fully_sharded_processes_hold_parts_and_have_equally_many_micro_batches(runs: dict[str, Run]) -> None:
    ranks = runs["fsdp3"].ranks
    rows = [rank["arrays"]["0 parameter embedding.token_type_embeddings.weight"].shape[0] for rank in ranks]
    assert rows == [1, 1, 0]
    rows = [rank["arrays"]["0 parameter embedding.word_embeddings.weight"].shape[0] for rank in ranks]
    assert rows[0] == rows[1] > rows[2] > 0
    # Two cells of eight make one micro-batch, and three make two.
    assert [len(rank["widths"]) for rank in ranks] == [2 * NUM_STEPS] * 3
    assert ranks[0]["widths"][1::2] == [1] * NUM_STEPS and ranks[0]["num_masked"][1::2] == [0] * NUM_STEPS
    assert min(ranks[1]["widths"]) > 1


@pytest.mark.parametrize("name", EXACT)
def test_initial_weights_are_the_same_bits(runs: dict[str, Run], name: str) -> None:
    expected, found = runs["one"].whole("parameter", 0), runs[name].whole("parameter", 0)
    assert expected.keys() == found.keys() and len(found) == 4 * 12 + 10
    for key in expected:
        np.testing.assert_array_equal(found[key], expected[key], err_msg=key)


@pytest.mark.parametrize("name", EXACT)
def test_losses_are_equal(runs: dict[str, Run], name: str) -> None:
    expected, found = runs["one"].series("loss"), runs[name].series("loss")
    assert len(expected) == NUM_STEPS
    np.testing.assert_allclose(found, expected, rtol=0, atol=FLOAT64)


@pytest.mark.parametrize("name", EXACT)
def test_validation_losses_are_equal(runs: dict[str, Run], name: str) -> None:
    expected, found = runs["one"].series("validation_loss"), runs[name].series("validation_loss")
    assert len(expected) == 2 and expected[0] != expected[1]
    np.testing.assert_allclose(found, expected, rtol=0, atol=FLOAT64)


@pytest.mark.parametrize("name", [name for name in EXACT if "zero" not in name])
@pytest.mark.parametrize("step", range(1, NUM_STEPS + 1))
def test_gradients_are_equal(runs: dict[str, Run], name: str, step: int) -> None:
    difference, key = worst_difference(runs["one"].whole("gradient", step), runs[name].whole("gradient", step))
    assert difference < FLOAT64, key


@pytest.mark.parametrize("name", EXACT)
def test_gradient_norms_are_equal(runs: dict[str, Run], name: str) -> None:
    expected = [norm(runs["one"].whole("gradient", step)) for step in range(1, NUM_STEPS + 1)]
    np.testing.assert_allclose(runs[name].series("grad_norm"), expected, rtol=NORM)


def norm(gradients: dict[str, np.ndarray]) -> float:
    return math.sqrt(sum(float(np.square(gradient).sum()) for gradient in gradients.values()))


@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize("step", range(1, NUM_STEPS + 1))
def test_updated_parameters_are_equal(runs: dict[str, Run], name: str, step: int) -> None:
    difference, key = worst_difference(runs["one"].whole("parameter", step), runs[name].whole("parameter", step))
    assert difference < FLOAT64, key


@pytest.mark.parametrize("name", ["one_dropout_selective", "one_dropout_full"])
def test_recomputed_activations_are_the_same_bits_dropout_included(runs: dict[str, Run], name: str) -> None:
    expected = runs["one_dropout"]
    np.testing.assert_array_equal(runs[name].series("loss"), expected.series("loss"))
    for step in range(1, NUM_STEPS + 1):
        assert worst_difference(runs[name].whole("parameter", step), expected.whole("parameter", step))[0] == 0.0


@pytest.mark.parametrize("name", ["dp2_zero_overlap", "dp2_zero_late"])
def test_parameters_gathered_late_are_those_of_the_step_before(runs: dict[str, Run], name: str) -> None:
    for key in ("loss", "validation_loss"):
        found, expected = runs[name].series(key), runs["one"].series(key)
        np.testing.assert_allclose(found, expected, rtol=0, atol=FLOAT64)
    expected = runs["one"].whole("parameter", NUM_STEPS)
    assert worst_difference(runs[name].whole("parameter", NUM_STEPS), expected)[0] < FLOAT64


@pytest.mark.parametrize("name", ["tp2_sp_pp2_pre_norm", "cp2_pp2_full_pre_norm"])
def test_the_pre_norm_variant_trains_packed_and_cut_in_every_way_as_on_one_process(
    runs: dict[str, Run], name: str
) -> None:
    one, cut = runs["one_pre_norm"], runs[name]
    assert worst_difference(one.whole("parameter", 0), cut.whole("parameter", 0))[0] == 0.0
    for key in ("loss", "validation_loss"):
        np.testing.assert_allclose(cut.series(key), one.series(key), rtol=0, atol=FLOAT64)
    for step in range(1, NUM_STEPS + 1):
        for kind in ("gradient", "parameter"):
            difference, key = worst_difference(one.whole(kind, step), cut.whole(kind, step))
            assert difference < FLOAT64, (step, kind, key)


@pytest.mark.parametrize("name", ["one", "one_pre_norm"])
def test_every_parameter_has_moved(runs: dict[str, Run], name: str) -> None:
    before, after = runs[name].whole("parameter", 0), runs[name].whole("parameter", NUM_STEPS)
    assert [key for key in before if (before[key] == after[key]).all()] == []


@pytest.mark.parametrize("name", ["tp2_pp2_clipped", "dp2_zero_clipped"])
def test_clipped_steps_are_equal(runs: dict[str, Run], name: str) -> None:
    expected = runs["one_clipped"]
    assert (expected.series("grad_norm") > 1.0).all(), "the norm of 0.1 clips nothing"
    # The float32 norm scales the gradients, so their seventh digit enters the moments; Adam's quotient cancels most.
    np.testing.assert_allclose(runs[name].series("loss"), expected.series("loss"), rtol=0, atol=1e-8)
    np.testing.assert_allclose(runs[name].series("grad_norm"), expected.series("grad_norm"), rtol=NORM)
    difference, key = worst_difference(
        runs[name].whole("parameter", NUM_STEPS), expected.whole("parameter", NUM_STEPS)
    )
    assert difference < 5e-7, key


def test_float32_losses_are_close(runs: dict[str, Run]) -> None:
    # Seven digits, and the small drift of six steps.
    for key in ("loss", "validation_loss", "grad_norm"):
        np.testing.assert_allclose(runs["tp2_fp32"].series(key), runs["one_fp32"].series(key), rtol=1e-6)
    np.testing.assert_allclose(runs["one_fp32"].series("loss")[0], runs["one"].series("loss")[0], rtol=1e-6)


def test_bfloat16_with_the_distributed_optimizer_learns(runs: dict[str, Run]) -> None:
    losses = runs["dp2_zero_bf16"].series("loss")
    # bfloat16 keeps three digits, and the loss of the first step is that of the same weights.
    np.testing.assert_allclose(losses[0], runs["one"].series("loss")[0], rtol=3e-3)
    assert losses[-1] < losses[0] - 0.3
    assert (np.diff(runs["dp2_zero_bf16"].series("validation_loss")) < 0).all()


def test_fully_sharded_bfloat16_is_that_of_the_distributed_optimizer(runs: dict[str, Run]) -> None:
    """Both sum gradients in float32 and keep float32 parameters; only the order of sums differs."""
    for key in ("loss", "validation_loss"):
        found, expected = runs["fsdp2_bf16"].series(key), runs["dp2_zero_bf16"].series(key)
        np.testing.assert_allclose(found, expected, rtol=1e-3)


def test_with_a_float32_residual_gradients_come_closer_to_the_exact_ones_in_any_layout(runs: dict[str, Run]) -> None:
    """The pipeline hands float32 on, and sequence parallelism gathers what is rounded."""
    exact = runs["one"].whole("gradient", 1)

    def error(name: str) -> float:
        found = runs[name].whole("gradient", 1)
        return norm({key: found[key] - exact[key] for key in exact}) / norm(exact)

    assert error("one_wide") < 0.8 * error("one_bf16")
    assert error("tp2_sp_pp2_wide") < 0.8 * error("one_bf16")
    one, cut = runs["one_wide"].series("loss"), runs["tp2_sp_pp2_wide"].series("loss")
    np.testing.assert_allclose(cut, one, rtol=5e-3)


def test_with_dropout_tensor_parallel_ranks_have_the_same_hidden_states(runs: dict[str, Run]) -> None:
    ranks = runs["tp2_dp2_dropout"].ranks
    by_place = {(rank["data_rank"], rank["tensor_rank"]): rank for rank in ranks}
    assert len(by_place) == 4
    for data_rank in range(2):
        left, right = by_place[data_rank, 0], by_place[data_rank, 1]
        # The embedding and four layers, two micro-batches a step.
        assert len(left["hidden_states"]) == 5 * 2 * NUM_STEPS
        assert left["hidden_states"] == right["hidden_states"]
        assert left["hidden_draws"] == right["hidden_draws"]
        # Ranks hold other heads, and drop other weights of theirs.
        assert set(left["attention_draws"]).isdisjoint(right["attention_draws"])


def test_with_dropout_replicas_draw_other_masks(runs: dict[str, Run]) -> None:
    ranks = runs["tp2_dp2_dropout"].ranks
    drawn = [{*rank["hidden_draws"], *rank["attention_draws"]} for rank in ranks if rank["tensor_rank"] == 0]
    assert len(drawn) == 2 and drawn[0].isdisjoint(drawn[1])


def test_with_dropout_split_sequences_and_stages_draw_other_masks(runs: dict[str, Run]) -> None:
    ranks = runs["tp2_sp_pp2_dropout"].ranks
    drawn = [{*rank["hidden_draws"], *rank["attention_draws"]} for rank in ranks]
    assert all(drawn)
    assert sum(len(draws) for draws in drawn) == len(set.union(*drawn))


@pytest.mark.parametrize("name", ["tp2_dp2_dropout", "tp2_sp_pp2_dropout"])
def test_with_dropout_no_mask_is_drawn_twice(runs: dict[str, Run], name: str) -> None:
    for rank in runs[name].ranks:
        drawn = rank["hidden_draws"] + rank["attention_draws"]
        assert len(drawn) == len(set(drawn))


@pytest.mark.parametrize("name", ["tp2_dp2_dropout", "tp2_sp_pp2_dropout"])
@pytest.mark.parametrize("kind", ["parameter", "gradient"])
def test_with_dropout_replicated_parameters_stay_the_same_bits(runs: dict[str, Run], name: str, kind: str) -> None:
    for step in range(1, NUM_STEPS + 1):
        runs[name].whole(kind, step)
