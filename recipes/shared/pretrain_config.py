"""The settings of a Geneformer pretraining run, and its command line's flags."""

from dataclasses import dataclass, field
from typing import Literal

from celltron.cells.corpus import DataConfig
from celltron.models.geneformer import GeneformerConfig
from celltron.train.engine import EngineConfig
from celltron.train.loop_config import LoopConfig
from celltron.train.optimizer import OptimizerConfig
from celltron.train.parallel import ParallelConfig
from celltron.train.precision import Precision
from celltron.train.report import ReportConfig
from celltron.train.schedule import ScheduleConfig
from celltron.train.spike import SpikeConfig

FLAGS = {
    "--data": "data.paths",
    "--layer": "data.convert.layer",
    "--use-raw": "data.convert.use_raw",
    "--species": "data.convert.species",
    "--gene-id-column": "data.convert.gene_id_column",
    "--allow-floats": "data.convert.allow_floats",
    "--out": "out",
    "--resume": "resume",
    "--device": "device",
    "--precision": "precision",
    "--seq-length": "data.max_length",
    "--micro-batch-size": "loop.micro_batch_size",
    "--global-batch-size": "loop.global_batch_size",
    "--max-steps": "loop.max_steps",
    "--seed": "loop.seed",
    "--lr": "schedule.learning_rate",
    "--warmup-steps": "schedule.warmup_steps",
    "--tensor-parallel": "parallel.tensor",
    "--pipeline-parallel": "parallel.pipeline",
    "--context-parallel": "parallel.context",
    "--sequence-parallel": "parallel.sequence_parallel",
    "--distributed-optimizer": "parallel.distributed_optimizer",
    "--fsdp": "parallel.fsdp",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """A Geneformer pretraining run."""

    out: str = ""
    """The run's folder; must be new, unless the run is resumed."""
    resume: str = ""
    """Empty starts anew; `auto` continues from the run's newest complete checkpoint, or starts anew where it has none;
    else the checkpoint folder to continue from."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto` takes a GPU where PyTorch sees one."""
    precision: Precision = "fp32"
    """Of parameters and activations; bf16 keeps float32 copies in the optimizer, fp64 is for proofs on a CPU."""
    data: DataConfig = field(default_factory=DataConfig)
    """Cells and tokens."""
    model: GeneformerConfig = field(default_factory=GeneformerConfig)
    """The model's shape."""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    """How processes divide the work."""
    engine: EngineConfig = field(default_factory=EngineConfig)
    """What is kept in memory, what runs beside what, and what layers are built of."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """AdamW."""
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    """Learning rate."""
    loop: LoopConfig = field(default_factory=LoopConfig)
    """Steps, batches, intervals."""
    report: ReportConfig = field(default_factory=ReportConfig)
    """Where metrics are shown."""
    spike: SpikeConfig = field(default_factory=SpikeConfig)
    """Which losses are noted as far above those before."""

    def __post_init__(self) -> None:
        if not self.out:
            raise ValueError("out is empty; name a folder for the run, such as --out runs/first")
        if not self.data.paths:
            raise ValueError("data.paths is empty; name a store or files of counts, such as --data cells.h5ad")
        self._check_lengths()
        self.schedule.check_length(self.loop.max_steps)
        self.model.check_layout(tensor_parallel=self.parallel.tensor, pipeline_parallel=self.parallel.pipeline)
        self.engine.check_precision(self.precision)
        self._check_widths()
        if self.engine.fp8 != "none" and self.parallel.fsdp:
            raise ValueError(
                f"engine.fp8 is {self.engine.fp8} with parallel.fsdp, but 8-bit copies of weights are not split; set "
                "engine.fp8=none, or parallel.fsdp=false"
            )

    def _check_lengths(self) -> None:
        multiple = self.padding_multiple
        if self.loop.packing:  # padding is a cell of its own
            longest = max(self.data.max_length, multiple - 1)
        else:
            longest = -(-self.data.max_length // multiple) * multiple
        if longest > self.model.max_positions:
            padded = f" (padded to {longest})" if longest > self.data.max_length else ""
            raise ValueError(
                f"data.max_length is {self.data.max_length}{padded}, longer than model.max_positions "
                f"({self.model.max_positions}); lower the one or raise the other"
            )

    def _check_widths(self) -> None:
        multiple = self.parallel.tensor * self.engine.rows_multiple
        for name in ("hidden_size", "ffn_hidden_size"):
            width = getattr(self.model, name)
            if self.engine.fp8 != "none" and width % multiple:
                raise ValueError(
                    f"engine.fp8 is {self.engine.fp8}, which wants widths that are a multiple of {multiple} with "
                    f"parallel.tensor {self.parallel.tensor}, but model.{name} is {width}; set engine.fp8=none, or "
                    "change the width"
                )

    @property
    def padding_multiple(self) -> int:
        """What a row's padded length is a multiple of.

        Context parallelism cuts it equally, sequence parallelism again, and 8-bit products want a multiple of theirs.
        """
        num_parts = self.parallel.context * (self.parallel.tensor if self.parallel.sequence_parallel else 1)
        return num_parts * self.engine.rows_multiple
