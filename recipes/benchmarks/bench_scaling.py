"""What `scaling.py` has torchrun start: training steps under one layout after another, on all processes of the launch.

Takes the path of a job, JSON; every process writes its answers beside it, as `<job>.<rank>`: of each run the seconds of
its steps, and the bytes of one more step, counted and by the formulas of `celltron.train.plan`. Where the job cannot be
done it writes the sentence that says so, as `refused`, and ends with code 2.
"""

import gc
import json
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from celltron.core import InputError, build_config, write_atomically
from celltron.core.errors import EXIT_BAD_INPUT
from celltron.recipes.benchmarks.bench_compare import Job, read_cells
from celltron.recipes.benchmarks.bench_fit import Steps, fit_steps
from celltron.recipes.geneformer_pretrain import Config
from celltron.train.launch import Launch, choose_device, read_launch, start_process_group
from celltron.train.parallel import start_model_parallel
from celltron.train.plan.communication import Stage, list_exchanges
from celltron.train.plan.layouts import Layout

# Megatron's names of the groups that the formulas know.
GROUPS = {
    "TENSOR_MODEL_PARALLEL_GROUP": "tensor",
    "CONTEXT_PARALLEL_GROUP": "context",
    "PIPELINE_MODEL_PARALLEL_GROUP": "pipeline",
    "DATA_PARALLEL_GROUP": "data",
    "DATA_PARALLEL_GROUP_WITH_CP": "data",
    "EMBEDDING_GROUP": "embedding",
}
OTHER = "others"


def main(arguments: Sequence[str]) -> int:
    """Run a job, write this process's answers and return its exit code."""
    path = Path(arguments[0])
    launch = read_launch()
    try:
        results = run_job(json.loads(path.read_text(encoding="utf-8")), launch)
    except InputError as error:
        results = {"refused": str(error)}
    # torchrun ends the others as soon as one process has refused.
    write_atomically(path.with_name(f"{path.name}.{launch.rank}"), json.dumps(results))
    return EXIT_BAD_INPUT if "refused" in results else 0


def run_job(job: Job, launch: Launch) -> Job:
    """Run all of a job's runs."""
    torch.set_num_threads(job["threads"])
    device = choose_device(job["device"], launch)
    start_process_group(launch, device)
    answers = []
    for run in job["runs"]:
        config = build_config(Config, run["config"])
        start_model_parallel(config.parallel, seed=config.loop.seed)
        layout = Layout(parallel=config.parallel, data=config.parallel.data(launch.world_size))
        answers.append(answer(job, run, config, layout))
        gc.collect()
        if launch.is_main:
            print(f"{run['name']}: {answers[-1]['seconds'][-1]:.3g} s a step", flush=True)
    torch.distributed.destroy_process_group()
    return {
        "runs": answers,
        "torch": torch.__version__,
        "gpu": torch.cuda.get_device_name() if device.type == "cuda" else None,
    }


def answer(job: Job, run: Job, config: Config, layout: Layout) -> Job:
    """Seconds of each step, and what this process sends in one, by group and kind."""
    batch = read_cells(run["cells"])
    steps = fit_steps(config, batch, num_tokens=job["num_tokens"], pad_id=job["pad_id"], count_bytes=True)
    sent: dict[tuple[str, str], dict[str, float]] = defaultdict(lambda: {"calls": 0, "counted": 0.0, "formula": 0.0})
    for (kind, name), traffic in steps.bytes.traffic.items():
        # With two stages Megatron lets one direction go over the group of all processes.
        group = GROUPS.get(name, "pipeline" if kind in ("send", "recv") else OTHER)
        sent[group, kind]["calls"] += traffic.calls
        sent[group, kind]["counted"] += traffic.sent_bytes
    for exchange in list_exchanges(describe_stage(config, steps), layout):
        sent[exchange.group, exchange.kind]["formula"] += exchange.sent_bytes(layout)
    return {
        "seconds": steps.seconds,
        "sent": [{"group": group, "kind": kind, **facts} for (group, kind), facts in sorted(sent.items())],
    }


def describe_stage(config: Config, steps: Steps) -> Stage:
    """This process's part of the model and of the batch, for the formulas."""
    model: Any = steps.model.module
    parameters = list(model.parameters())
    embedding = model.shared_embedding_or_output_weight() if model.pre_process or model.post_process else None
    num_layers = config.model.num_layers // config.parallel.pipeline
    micro_batches = steps.batch.micro_batches
    num_places = sum(micro_batch["tokens_BS"].numel() for micro_batch in micro_batches)
    num_predicted = sum(micro_batch["labels_M"].numel() for micro_batch in micro_batches)
    place_bytes = config.model.hidden_size * parameters[0].element_size()
    return Stage(
        is_first=model.pre_process,
        is_last=model.post_process,
        num_layers=num_layers,
        num_recomputed_layers=num_layers if config.engine.recompute == "full" else 0,
        num_reattended_layers=num_layers if config.engine.recompute != "none" else 0,
        num_parameters=sum(parameter.numel() for parameter in parameters),
        num_split_parameters=sum(
            parameter.numel() for parameter in parameters if getattr(parameter, "sequence_parallel", False)
        ),
        num_embedding_parameters=0 if embedding is None else embedding.numel(),
        value_bytes=parameters[0].element_size(),
        gradient_bytes=parameters[0].main_grad.element_size(),
        num_micro_batches=len(micro_batches),
        hidden_bytes=num_places * place_bytes,
        predicted_bytes=num_predicted * place_bytes,
        num_predicted=num_predicted,
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
