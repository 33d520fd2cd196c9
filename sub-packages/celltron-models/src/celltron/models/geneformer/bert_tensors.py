"""Geneformer's parameters under the names and in the layouts of Hugging Face's `BertForMaskedLM`, and back, exactly.

Axes: V vocabulary, R its rows with padding, D width, F feed-forward width, N heads, H head width, D = N x H.
Two things differ in layout. Megatron holds the three attention projections as one matrix whose rows run over
[N, 3, H], with q, k and v side by side for each head; BERT holds three of [N x H] rows. And Megatron's vocabulary is
padded from V to R rows.
"""

from collections.abc import Mapping

import torch

from celltron.models.geneformer.config import GeneformerConfig
from celltron.models.geneformer.model import NUM_TOKEN_TYPES, PADDING_ROW_BIAS

WORD_EMBEDDINGS = "bert.embeddings.word_embeddings.weight"
OUTPUT_BIAS = "cls.predictions.bias"
# In Hugging Face's model these are the two above under a second name, so a file may hold them or not.
TIED_TO = {"cls.predictions.decoder.weight": WORD_EMBEDDINGS, "cls.predictions.decoder.bias": OUTPUT_BIAS}

PADDED = {"embedding.word_embeddings.weight": WORD_EMBEDDINGS, "output_layer.bias": OUTPUT_BIAS}
_PROJECTIONS = ("query", "key", "value")
_OUTER = {
    "embedding.position_embeddings": "bert.embeddings.position_embeddings",
    "embedding.token_type_embeddings": "bert.embeddings.token_type_embeddings",
    "embedding.norm": "bert.embeddings.LayerNorm",
    "head.dense": "cls.predictions.transform.dense",
    "head.norm": "cls.predictions.transform.LayerNorm",
}
_INNER = {
    "self_attention.linear_proj": "attention.output.dense",
    "attention_norm": "attention.output.LayerNorm",
    "mlp.linear_fc1": "intermediate.dense",
    "mlp.linear_fc2": "output.dense",
    "mlp_norm": "output.LayerNorm",
}


def list_bert_shapes(config: GeneformerConfig, num_tokens: int) -> dict[str, tuple[int, ...]]:
    """Every tensor that a `BertForMaskedLM` of this shape must hold, tied ones once, and its shape."""
    D, F = config.hidden_size, config.ffn_hidden_size
    linear = {
        "cls.predictions.transform.dense": (D, D),
        **{
            f"{_layer(layer)}.{name}": shape
            for layer in range(config.num_layers)
            for name, shape in {
                **{f"attention.self.{projection}": (D, D) for projection in _PROJECTIONS},
                "attention.output.dense": (D, D),
                "intermediate.dense": (F, D),
                "output.dense": (D, F),
            }.items()
        },
    }
    norms = [
        "bert.embeddings.LayerNorm",
        "cls.predictions.transform.LayerNorm",
        *(
            f"{_layer(layer)}.{name}"
            for layer in range(config.num_layers)
            for name in ("attention.output.LayerNorm", "output.LayerNorm")
        ),
    ]
    shapes: dict[str, tuple[int, ...]] = {
        WORD_EMBEDDINGS: (num_tokens, D),
        "bert.embeddings.position_embeddings.weight": (config.max_positions, D),
        "bert.embeddings.token_type_embeddings.weight": (NUM_TOKEN_TYPES, D),
        OUTPUT_BIAS: (num_tokens,),
    }
    for name, shape in linear.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    for name in norms:
        shapes |= {f"{name}.weight": (D,), f"{name}.bias": (D,)}
    return shapes


def to_bert_tensors(
    config: GeneformerConfig, parameters: Mapping[str, torch.Tensor], num_tokens: int
) -> dict[str, torch.Tensor]:
    """Rename, split the attention projections, and cut the rows that only pad the vocabulary.

    Args:
        config: The model's shape.
        parameters: Of a whole model, one process's, by name.
        num_tokens: V.

    Returns:
        BERT's tensors by name, contiguous; they may share memory with `parameters`.
    """
    tensors = {}
    for ours, theirs in _one_to_one(config).items():
        tensor = parameters[ours]
        tensors[theirs] = (tensor[:num_tokens] if ours in PADDED else tensor).contiguous()
    for ours, names in _projections(config).items():
        for name, tensor in zip(names, _split_heads(parameters[ours], config.num_attention_heads), strict=True):
            tensors[name] = tensor
    wrong = set(list_bert_shapes(config, num_tokens).items()) ^ {(name, tuple(t.shape)) for name, t in tensors.items()}
    assert not wrong, f"the shape and the parameters differ in {sorted(wrong)}"
    return tensors


def from_bert_tensors(config: GeneformerConfig, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Undo `to_bert_tensors`; rows that pad the vocabulary become 0, with an output bias that leaves them out."""
    parameters = {}
    for ours, theirs in _one_to_one(config).items():
        parameters[ours] = pad_rows(config, ours, tensors[theirs])
    for ours, names in _projections(config).items():
        parameters[ours] = _join_heads([tensors[name] for name in names], config.num_attention_heads)
    return parameters


def pad_rows(config: GeneformerConfig, name: str, tensor: torch.Tensor) -> torch.Tensor:
    """[V, ...] to [R, ...] where that parameter, by our name, has a row for each token; else the tensor as it is."""
    if name not in PADDED:
        return tensor
    num_padding = config.padded_vocabulary(tensor.shape[0]) - tensor.shape[0]
    fill = PADDING_ROW_BIAS if tensor.dim() == 1 else 0.0
    return torch.cat([tensor, tensor.new_full((num_padding, *tensor.shape[1:]), fill)])


def _layer(layer: int) -> str:
    return f"bert.encoder.layer.{layer}"


def _one_to_one(config: GeneformerConfig) -> dict[str, str]:
    """Our name to theirs, of the parameters that one tensor stands for."""
    modules = _OUTER | {
        f"encoder.layers.{layer}.{ours}": f"{_layer(layer)}.{theirs}"
        for layer in range(config.num_layers)
        for ours, theirs in _INNER.items()
    }
    names = dict(PADDED)
    for ours, theirs in modules.items():
        kinds = ("weight",) if ours.endswith("_embeddings") else ("weight", "bias")
        names |= {f"{ours}.{kind}": f"{theirs}.{kind}" for kind in kinds}
    return names


def _projections(config: GeneformerConfig) -> dict[str, list[str]]:
    """Our joint projection's name to theirs of q, k and v."""
    return {
        f"encoder.layers.{layer}.self_attention.linear_qkv.{kind}": [
            f"{_layer(layer)}.attention.self.{projection}.{kind}" for projection in _PROJECTIONS
        ]
        for layer in range(config.num_layers)
        for kind in ("weight", "bias")
    }


def _split_heads(joint: torch.Tensor, num_heads: int) -> list[torch.Tensor]:
    """[N x 3 x H, ...] to q, k and v of [N x H, ...]."""
    by_head = joint.reshape(num_heads, 3, -1, *joint.shape[1:])
    return [by_head[:, part].flatten(0, 1).contiguous() for part in range(3)]


def _join_heads(parts: list[torch.Tensor], num_heads: int) -> torch.Tensor:
    """Undo `_split_heads`."""
    return torch.stack([part.reshape(num_heads, -1, *part.shape[1:]) for part in parts], dim=1).flatten(0, 2)
