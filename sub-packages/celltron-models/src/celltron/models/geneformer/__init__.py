"""Geneformer: a BERT over genes ranked by expression (Theodoris et al. 2023, doi:10.1038/s41586-023-06139-9)."""

from celltron.models.geneformer.config import GeneformerConfig
from celltron.models.geneformer.huggingface import (
    WholeGeneformer,
    from_huggingface,
    put_parameters,
    take_parameters,
    to_huggingface,
)
from celltron.models.geneformer.model import Geneformer, build_geneformer, make_transformer_config
from celltron.models.geneformer.model_file import MODEL_FILE_NAME, ModelShape, read_model_shape
from celltron.models.geneformer.objective import masked_gene_loss

__all__ = [
    "MODEL_FILE_NAME",
    "Geneformer",
    "GeneformerConfig",
    "ModelShape",
    "WholeGeneformer",
    "build_geneformer",
    "from_huggingface",
    "make_transformer_config",
    "masked_gene_loss",
    "put_parameters",
    "read_model_shape",
    "take_parameters",
    "to_huggingface",
]
