"""What a user can get wrong: one sentence that says what, where and what to do; exit code 2; nothing half-written."""

import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anndata
import h5py
import numpy as np
import pytest
import scipy.sparse as sp

Words = list[object]


@dataclass(frozen=True)
class Place:
    """What a case may use; it makes what is wrong below `folder`."""

    folder: Path
    cells: anndata.AnnData
    h5ad: Path
    store: Path
    config: Path
    run: Path

    def write(self, adata: anndata.AnnData) -> Path:
        adata.write_h5ad(self.folder / "bad.h5ad")
        return self.folder / "bad.h5ad"

    def convert(self, *words: object) -> Words:
        return ["convert", *words, "--out", self.folder / "new.store"]

    def train(self, *words: object, config: Path | None = None) -> Words:
        data = ["--data", self.store, "--out", self.folder / "new_run"]
        return ["train", "--config", config or self.config, *data, *words]

    def copy_store(self) -> Path:
        return Path(shutil.copytree(self.store, self.folder / "copy.store"))

    def copy_run(self) -> Path:
        return Path(shutil.copytree(self.run, self.folder / "copy_run"))


def with_value(place: Place, value: float) -> Words:
    adata = place.cells.copy()
    adata.X.data[7] = value
    return place.convert(place.write(adata))


def truncated(place: Place) -> Words:
    path = place.folder / "bad.h5ad"
    path.write_bytes(place.h5ad.read_bytes()[: place.h5ad.stat().st_size // 2])
    return place.convert(path)


def not_h5ad(place: Place) -> Words:
    (place.folder / "bad.h5ad").write_text("cell,gene\n1,2\n")
    return place.convert(place.folder / "bad.h5ad")


def other_hdf5(place: Place) -> Words:
    with h5py.File(place.folder / "bad.h5ad", "w") as file:
        file["matrix"] = np.zeros(3)
    return place.convert(place.folder / "bad.h5ad")


def log_normalised(place: Place) -> Words:
    adata = place.cells.copy()
    adata.layers["counts"] = adata.X.copy()
    adata.X = sp.csr_matrix(np.log1p(adata.X / adata.X.sum(axis=1) * 1e4))
    return place.convert(place.write(adata))


def log_normalised_with_raw(place: Place) -> Words:
    adata = place.cells.copy()
    adata.raw = adata.copy()
    adata.X = sp.csr_matrix(np.log1p(adata.X / adata.X.sum(axis=1) * 1e4))
    return place.convert(place.write(adata))


def unmappable(place: Place) -> Words:
    adata = place.cells.copy()
    adata.var_names = [f"feature_{i}" for i in range(adata.n_vars)]
    return place.convert(place.write(adata))


def repeated_cells(place: Place) -> Words:
    adata = place.cells.copy()
    adata.obs_names = ["same", "same", *adata.obs_names[2:]]
    return place.convert(place.write(adata))


def empty_file(place: Place) -> Words:
    (place.folder / "bad.h5ad").touch()
    return place.convert(place.folder / "bad.h5ad")


def no_cells(place: Place) -> Words:
    return place.convert(place.write(place.cells[:0].copy()))


def other_store_version(place: Place) -> Words:
    path = place.copy_store() / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"version": 99}))
    return ["info", path.parent]


def missing_shard(place: Place) -> Words:
    store = place.copy_store()
    (store / "shards" / "00001" / "counts.bin").unlink()
    return ["info", store]


def truncated_shard(place: Place) -> Words:
    store = place.copy_store()
    os.truncate(store / "shards" / "00001" / "indices.bin", 10)
    return place.train("--data", store)


def flip_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def flipped_in_store(place: Place) -> Words:
    store = place.copy_store()
    flip_byte(store / "shards" / "00002" / "counts.bin")
    return ["verify", store]


def flipped_in_checkpoint(place: Place) -> Words:
    run = place.copy_run()
    flip_byte(run / "checkpoints" / "step_00000004" / "state" / "__0_0.distcp")
    return ["verify", run / "checkpoints" / "step_00000004"]


def export_damaged(place: Place) -> Words:
    run = place.copy_run()
    flip_byte(run / "checkpoints" / "step_00000004" / "vocabulary.json")
    return ["export", "--checkpoint", run, "--out", place.folder / "new_folder"]


def damaged_manifest(place: Place) -> Words:
    store = place.copy_store()
    (store / "manifest.json").write_text('{"format": "celltron-cell')
    return ["verify", store]


def config_with(text: str) -> Callable[[Place], Words]:
    def case(place: Place) -> Words:
        path = place.folder / "bad.yaml"
        path.write_text(text)
        return place.train(config=path)

    return case


def occupied_store(place: Place) -> Words:
    place.copy_store().rename(place.folder / "new.store")
    return place.convert(place.h5ad)


def occupied_folder(place: Place) -> Words:
    (place.folder / "new.store").mkdir()
    (place.folder / "new.store" / "thesis.txt").write_text("two years of work")
    return [*place.convert(place.h5ad), "--replace"]


def occupied_run(place: Place) -> Words:
    return ["train", "--config", place.config, "--data", place.store, "--out", place.copy_run()]


def run_over_a_thesis(place: Place) -> Words:
    (place.folder / "new_run").mkdir()
    (place.folder / "new_run" / "config.yaml").write_text("supervisor: strict")
    return place.train("--data", place.h5ad)


def resume_with(*words: object) -> Callable[[Place], Words]:
    def case(place: Place) -> Words:
        start = ["train", "--config", place.config, "--data", place.store, "--out", place.copy_run()]
        return [*start, "--resume", "auto", "loop.max_steps=8", *words]

    return case


def resume_damaged(place: Place) -> Words:
    run = place.copy_run()
    for checkpoint in (run / "checkpoints").glob("step_*"):
        (checkpoint / "run.json").unlink()
    return ["train", "--config", place.config, "--data", place.store, "--out", run, "--resume", "auto"]


def resume_finished(place: Place) -> Words:
    return ["train", "--config", place.config, "--data", place.store, "--out", place.copy_run(), "--resume", "auto"]


def resume_where_no_run_is(place: Place) -> Words:
    out = place.folder / "mine"
    out.mkdir()
    (out / "config.yaml").write_text("years of tuning")
    return ["train", "--config", place.config, "--data", place.store, "--out", out, "--resume", "auto"]


def resume_other_cells(place: Place) -> Words:
    place.write(place.cells[:60].copy())
    run = place.copy_run()
    words = ["--data", place.folder / "bad.h5ad", "--out", run, "--resume", "auto", "loop.max_steps=8"]
    return ["train", "--config", place.config, *words]


CASES: dict[str, tuple[Callable[[Place], Words], str]] = {
    "not an h5ad": (not_h5ad, r"bad\.h5ad.*(not|no) .*h5ad"),
    "another hdf5 file": (other_hdf5, r"bad\.h5ad"),
    "truncated h5ad": (truncated, r"bad\.h5ad.*(truncated|damaged)"),
    "empty file": (empty_file, r"bad\.h5ad"),
    "no cells": (no_cells, r"bad\.h5ad.* cell"),
    "missing file": (lambda p: p.convert(p.folder / "nowhere.h5ad"), r"nowhere\.h5ad"),
    "a folder": (lambda p: p.convert(p.folder), "folder"),
    "negative counts": (lambda p: with_value(p, -1.0), "-1.*cell"),
    "NaN counts": (lambda p: with_value(p, np.nan), "(?i)nan"),
    "infinite counts": (lambda p: with_value(p, np.inf), "inf"),
    "fractions": (lambda p: with_value(p, 0.5), "--allow-floats"),
    "log-normalised, counts in a layer": (log_normalised, "--layer counts"),
    "log-normalised, counts in raw": (log_normalised_with_raw, "--use-raw"),
    "missing layer": (lambda p: p.convert(p.h5ad, "--layer", "spliced"), "spliced"),
    "no raw": (lambda p: p.convert(p.h5ad, "--use-raw"), "raw"),
    "missing gene column": (lambda p: p.convert(p.h5ad, "--gene-id-column", "ensembl"), "ensembl"),
    "no gene that maps": (unmappable, "feature_0"),
    "another species": (lambda p: p.convert(p.h5ad, "--species", "mouse"), "mouse"),
    "repeated cell ids": (repeated_cells, "same"),
    "missing obs column": (lambda p: p.convert(p.h5ad, "--obs-columns", "donr"), "donr"),
    "store in use": (occupied_store, r"new\.store.*--replace|new\.store exists"),
    "folder of another's files": (occupied_folder, r"new\.store"),
    "no such store": (lambda p: ["info", p.folder / "nowhere"], "nowhere"),
    "other store version": (other_store_version, "99"),
    "missing shard": (missing_shard, r"00001/counts\.bin"),
    "truncated shard": (truncated_shard, r"00001/indices\.bin"),
    "flipped byte in a store": (flipped_in_store, r"00002/counts\.bin"),
    "flipped byte in a checkpoint": (flipped_in_checkpoint, r"__0_0\.distcp"),
    "damaged checkpoint to export": (export_damaged, r"vocabulary\.json"),
    "damaged manifest": (damaged_manifest, r"manifest\.json"),
    "no verb": (lambda p: [], "COMMAND"),
    "unknown verb": (lambda p: ["covnert"], "covnert"),
    "config typo": (config_with("loop: {max_stesp: 3}"), r"max_stesp.*max_steps"),
    "section typo": (config_with("modle: {num_layers: 3}"), "modle.*model"),
    "wrong type": (config_with("loop: {max_steps: many}"), "loop.max_steps.*many"),
    "number for a truth value": (config_with("parallel: {sequence_parallel: 1}"), "parallel.sequence_parallel.*1"),
    "key given twice": (config_with("loop: {seed: 1}\nloop: {seed: 2}"), "loop"),
    "config of a list": (config_with("- 1\n- 2\n"), r"bad\.yaml"),
    "config that is no YAML": (config_with("loop: {max_steps: [1"), r"bad\.yaml"),
    "missing config": (lambda p: p.train(config=p.folder / "no.yaml"), r"no\.yaml"),
    "unknown flag": (lambda p: p.train("--max-setps", "3"), "--max-setps.*--max-steps"),
    "override typo": (lambda p: p.train("optimizer.beta3=0.9"), "beta3"),
    "no data": (lambda p: ["train", "--config", p.config, "--out", p.folder / "new_run"], "data.paths"),
    "no such data": (lambda p: p.train("--data", p.folder / "nowhere.store"), r"nowhere\.store"),
    "a run for data": (lambda p: p.train("--data", p.run), "tiny|run"),
    "a checkpoint for data": (
        lambda p: p.train("--data", p.run / "checkpoints" / "step_00000004"),
        "celltron-checkpoint.*celltron-cellstore",
    ),
    "damaged h5ad to train on": (lambda p: p.train("--data", truncated(p)[1]), r"bad\.h5ad"),
    "log-normalised to train on": (lambda p: p.train("--data", log_normalised(p)[1]), "counts"),
    "no out": (lambda p: ["train", "--config", p.config, "--data", p.store], "--out"),
    "too many processes": (
        lambda p: p.train("--tensor-parallel", "2", "--pipeline-parallel", "2"),
        r"tensor 2 x .*pipeline 2 x .*context 1 = 4 .* number of processes, 1",
    ),
    "heads over tensor": (lambda p: p.train("--tensor-parallel", "4"), "num_attention_heads.*parallel.tensor"),
    "layers over pipeline": (lambda p: p.train("--pipeline-parallel", "3"), "num_layers.*parallel.pipeline"),
    "sequence parallel alone": (lambda p: p.train("--sequence-parallel"), "sequence_parallel"),
    "longer than positions": (lambda p: p.train("--seq-length", "64"), "max_length.*64.*max_positions"),
    "batches that do not divide": (
        lambda p: p.train("--global-batch-size", "7", "loop.packing=false"),
        "global_batch_size 7",
    ),
    "warm-up longer than the run": (lambda p: p.train("--warmup-steps", "50"), "warmup_steps 50"),
    "head width": (lambda p: p.train("model.hidden_size=17"), "hidden_size|num_attention_heads"),
    "dropout of 1": (lambda p: p.train("model.hidden_dropout=1.0"), "hidden_dropout"),
    "masking shares": (lambda p: p.train("data.masking.random_share=0.5"), "random_share"),
    "no validation column": (lambda p: p.train("data.validation_by=doner"), "doner.*donor"),
    "no validation group": (
        lambda p: p.train("data.validation_by=donor", "data.validation_groups=[donor 9]"),
        "donor 9",
    ),
    "no vocabulary": (lambda p: p.train("data.vocabulary=gc31M"), "gc31M"),
    "learning rate of zero": (lambda p: p.train("--lr", "0"), "schedule.learning_rate"),
    "negative step count": (lambda p: p.train("--max-steps=-3"), "loop.max_steps is -3"),
    "medians into nowhere": (lambda p: ["medians", p.store, "--out", p.folder / "no" / "m.json"], r"no/"),
    "export over a run": (lambda p: ["export", "--checkpoint", p.run, "--out", p.run], "exists"),
    "export of nothing": (lambda p: ["export", "--checkpoint", p.folder, "--out", p.folder / "hf"], "manifest"),
    "info of nothing": (lambda p: ["info", p.folder], "manifest.json"),
    "no GPU": (lambda p: p.train("--device", "cuda"), "cuda"),
    "run in use": (occupied_run, "--resume auto"),
    "run over another's files": (run_over_a_thesis, "new_run holds files that no run made"),
    "resume with another model": (resume_with("model.vocabulary_multiple=16"), "model.vocabulary_multiple is 16.* 8"),
    "resume with other masks": (
        resume_with("data.masking.random_share=0.02"),
        "data.masking is .*0.02.* was trained with .*0.1",
    ),
    "resume with another split": (resume_with("data.validation_by=donor"), "data.validation_by is 'donor'"),
    "nothing masked": (lambda p: p.train("data.masking.probability=0"), "data.masking.probability is 0"),
    "padded beyond positions": (
        lambda p: p.train(
            "--sequence-parallel",
            "--tensor-parallel=2",
            "--seq-length=31",
            "model.max_positions=31",
            "loop.packing=false",
        ),
        r"max_length.*31 \(padded to 32\)",
    ),
    "constant with a floor": (
        lambda p: p.train("schedule.decay=constant", "schedule.minimum_learning_rate=1e-4"),
        "schedule.decay is constant",
    ),
    "resume from nothing": (lambda p: p.train("--resume", p.folder / "nowhere"), "nowhere"),
    "resume from a store": (lambda p: p.train("--resume", p.store), "celltron-checkpoint"),
    "resume with all damaged": (resume_damaged, r"run\.json"),
    "resume where no run is": (resume_where_no_run_is, "mine"),
    "resume a finished run": (resume_finished, "max_steps"),
    "resume with other cells": (resume_other_cells, "store"),
}
# What a run says of the conversion that it made before it found the mistake.
REPORT = re.compile(r"\S+cells.store: |read \d|  \S+\.h5ad: ")
HAS_GPU = Path("/dev/nvidia0").exists()


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory: pytest.TempPathFactory, warm_python: Any, tiny_config: Path, tiny_store: Path) -> Path:
    """A run of four steps with two checkpoints; not to be changed."""
    out = tmp_path_factory.mktemp("bad_input") / "run"
    words = ["--config", tiny_config, "--data", tiny_store, "--out", out, "loop.save_every=2"]
    ended = warm_python.run("-m", "celltron.cli.main", "train", *words)
    assert ended.code == 0, ended.stderr
    return out


@pytest.fixture
def place(
    tmp_path: Path, tiny_cells: anndata.AnnData, tiny_h5ad: Path, tiny_store: Path, tiny_config: Path, whole_run: Path
) -> Place:
    return Place(tmp_path, tiny_cells, tiny_h5ad, tiny_store, tiny_config, whole_run)


def listing(folder: Path) -> dict[str, bytes | None]:
    """Every file below a folder with what it holds."""
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.filterwarnings("ignore:Observation names are not unique")
def test_one_sentence_and_nothing_written(name: str, place: Place, warm_python: Any) -> None:
    if name == "no GPU" and HAS_GPU:
        pytest.skip("there is a GPU")
    make, wanted = CASES[name]
    words = make(place)
    before = listing(place.folder)
    ended = warm_python.run("-m", "celltron.cli.main", *words)
    lines = [line for line in ended.stderr.splitlines() if not REPORT.match(line)]
    assert ended.code == 2, ended.stderr
    assert len(lines) == 1 and lines[0].startswith("celltron: error: "), ended.stderr
    assert re.search(wanted, lines[0]), lines[0]
    assert listing(place.folder) == before
