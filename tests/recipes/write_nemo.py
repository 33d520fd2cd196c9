"""Write checkpoints as NeMo 2 does, with megatron-core's own `BertModel`, import and export each.

`write_nemo.py FOLDER` makes for every case FOLDER/<case>/nemo (weights/ and context/), FOLDER/<case>/checkpoint and
FOLDER/<case>/huggingface, what the recipes make of it, and FOLDER/<case>/logits.safetensors: of BertModel and of
celltron's model with the checkpoint's parameters, both computed in float64. FOLDER/bare and FOLDER/bare.hf are made
without context/. FOLDER/cells.safetensors holds the cells, FOLDER/done comes last.
"""

import json
import queue
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.models.bert.bert_layer_specs import bert_layer_local_spec
from megatron.core.models.bert.bert_model import BertModel
from megatron.core.transformer.transformer_config import TransformerConfig
from safetensors.torch import save_file

from celltron.core import run_command
from celltron.models.geneformer import build_geneformer, put_parameters
from celltron.recipes import geneformer_export_hf, geneformer_import_nemo
from celltron.train.launch import Launch, start_process_group
from celltron.train.parallel import ParallelConfig, start_model_parallel

GENES = [f"ENSG{number:011}" for number in range(96)]
SPECIALS = ["[CLS]", "[MASK]", "[PAD]", "[SEP]", "[UKW]"]
NUM_TOKENS = len(SPECIALS) + len(GENES)
PAD_ID = 2
NUM_ROWS = 112
SIZES = {"num_layers": 3, "hidden_size": 24, "ffn_hidden_size": 40, "num_attention_heads": 4}
NUM_POSITIONS = 16
# Whether the layers are joined on a first axis, whether bias and GELU are fused, and the precision.
CASES = {
    "joined_fused": (True, True, torch.float32),
    "apart_exact": (False, False, torch.float32),
    "joined_bf16": (True, False, torch.bfloat16),
}


class Payload:
    """Makes a file when it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.trace,)


def draw_cells() -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids [B, S], and where there is padding [B, S]."""
    lengths = torch.tensor([16, 9, 1, 13])
    tokens_BS = torch.randint(3, NUM_TOKENS, (4, 16), generator=torch.Generator().manual_seed(3))
    is_padding_BS = torch.arange(16)[None, :] >= lengths[:, None]
    return tokens_BS.masked_fill(is_padding_BS, PAD_ID), is_padding_BS


@torch.no_grad()
def build_bert(*, is_fused: bool, dtype: torch.dtype) -> BertModel:
    """Megatron's model with BioNeMo's settings; every parameter, padding rows too, has values of its own."""
    config = TransformerConfig(
        **SIZES,
        hidden_dropout=0.02,
        attention_dropout=0.1,
        layernorm_epsilon=1e-12,
        activation_func=torch.nn.functional.gelu,
        bias_activation_fusion=is_fused,
        params_dtype=dtype,
        bf16=dtype is torch.bfloat16,
    )
    model = BertModel(
        config,
        num_tokentypes=0,
        transformer_layer_spec=bert_layer_local_spec,
        vocab_size=NUM_ROWS,
        max_sequence_length=NUM_POSITIONS,
        share_embeddings_and_output_weights=True,
        add_binary_head=False,
    ).to(dtype)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        values = 0.3 * torch.randn(parameter.shape, generator=generator)
        parameter.copy_(values + 1.0 if name.endswith(("norm.weight", "layer_norm.weight")) else values)
    return model.eval()


def save_as_nemo(folder: Path, model: BertModel, *, is_joined: bool, is_fused: bool, trace: Path) -> None:
    """Write `weights/`, `context/io.json`, and BioNeMo's vocabulary and medians."""
    (folder / "weights").mkdir(parents=True)
    model_state = model.sharded_state_dict(prefix="module.", metadata={"non_homogeneous_layers": not is_joined})
    for entry in model_state.values():
        if isinstance(entry, ShardedObject):
            # Transformer Engine leaves pickled objects in `_extra_state`.
            entry.data = Payload(trace)
    state: dict[str, Any] = {
        "epoch": 0,
        "global_step": 7,
        "state_dict": {},
        "sharded_state_dict": model_state,
        "optimizer": ShardedTensor.from_rank_offsets(
            "optimizer.state.exp_avg.module.embedding.word_embeddings.weight", torch.ones(NUM_ROWS, 24)
        ),
    }
    # Megatron would serve this queue from a process of its own.
    filesystem_async._results_queue = queue.Queue()
    dist_checkpointing.save(state, str(folder / "weights"))
    settings = {**SIZES, "seq_length": NUM_POSITIONS, "hidden_dropout": 0.02, "bias_activation_fusion": is_fused}
    items = [[f"Attr(name='{name}')", {"type": "leaf", "value": value}] for name, value in settings.items()]
    gelu = {"type": "pyref", "module": "torch._C._nn", "name": "gelu"}
    config = {"type": {"type": "pyref"}, "items": [*items, ["Attr(name='activation_func')", gelu]]}
    (folder / "context").mkdir()
    (folder / "context" / "io.json").write_text(json.dumps({"root": {}, "objects": {"geneformer_config_1": config}}))
    ids = {token: place for place, token in enumerate(SPECIALS + GENES)}
    (folder.parent / "geneformer.vocab").write_text(json.dumps({"vocab": ids, "gene_to_ens": {}}))
    (folder.parent / "medians.json").write_text(json.dumps({gene: 0.5 + i / 7 for i, gene in enumerate(GENES)}))


@torch.no_grad()
def make_case(folder: Path, *, is_joined: bool, is_fused: bool, dtype: torch.dtype) -> None:
    start_model_parallel(ParallelConfig(), seed=0)
    bert = build_bert(is_fused=is_fused, dtype=dtype)
    save_as_nemo(folder / "nemo", bert, is_joined=is_joined, is_fused=is_fused, trace=folder / "trace")
    tokens_BS, is_padding_BS = draw_cells()
    save_file(
        {name: parameter.detach().clone() for name, parameter in bert.named_parameters()},
        folder / "parameters.safetensors",
    )
    words = ["--vocabulary", str(folder / "geneformer.vocab"), "--medians", str(folder / "medians.json")]
    words += ["--folder", str(folder / "nemo"), "--out", str(folder / "checkpoint"), "vocabulary_multiple=16"]
    precision = ["--dtype", "bf16" if dtype is torch.bfloat16 else "fp32"]
    assert run_command(geneformer_import_nemo.main, [*words, *precision]) == 0
    words = ["--checkpoint", str(folder / "checkpoint"), "--out", str(folder / "huggingface"), *precision]
    assert run_command(geneformer_export_hf.main, words) == 0
    whole = geneformer_export_hf.read_whole(folder / "checkpoint")
    model = build_geneformer(
        whole.config, num_tokens=NUM_TOKENS, dtype=torch.float64, sequence_parallel=False, seed=5
    ).eval()
    put_parameters(model, whole.parameters)
    logits_MV = model(tokens_BS, is_padding_BS)
    # The parameters are exact in float64, and its rounding is far below any difference in meaning.
    wide = build_bert(is_fused=is_fused, dtype=torch.float64)
    wide.load_state_dict({name: value for name, value in bert.state_dict().items() if "_extra_state" not in name})
    wanted_BSV = wide(tokens_BS, (~is_padding_BS).long())[0]
    save_file(
        {"bert": wanted_BSV.flatten(0, 1)[:, :NUM_TOKENS].contiguous(), "ours": logits_MV[:, :NUM_TOKENS].contiguous()},
        folder / "logits.safetensors",
    )


def import_without_context(folder: Path) -> None:
    """Import weights alone, and export the checkpoint in a run of its own: FOLDER/bare and FOLDER/bare.hf."""
    shutil.copytree(folder / "joined_fused" / "nemo" / "weights", folder / "bare.nemo" / "weights")
    words = ["--folder", str(folder / "bare.nemo"), "--out", str(folder / "bare"), "--heads", "4"]
    words += ["--vocabulary", str(folder / "joined_fused" / "geneformer.vocab"), "vocabulary_multiple=16"]
    assert run_command(geneformer_import_nemo.main, words) == 0
    words = ["--checkpoint", str(folder / "bare"), "--out", str(folder / "bare.hf")]
    assert run_command(geneformer_export_hf.main, words) == 0


def main() -> None:
    """Write every case."""
    folder = Path(sys.argv[1])
    # Megatron compiles its fused GELU, which takes a C++ compiler; the formula is the same without.
    torch.compiler.set_stance("force_eager")
    start_process_group(Launch(), torch.device("cpu"))
    tokens_BS, is_padding_BS = draw_cells()
    save_file({"tokens": tokens_BS, "is_padding": is_padding_BS}, folder / "cells.safetensors")
    for name, (is_joined, is_fused, dtype) in CASES.items():
        (folder / name).mkdir()
        make_case(folder / name, is_joined=is_joined, is_fused=is_fused, dtype=dtype)
    import_without_context(folder)
    (folder / "done").touch()


if __name__ == "__main__":
    main()
