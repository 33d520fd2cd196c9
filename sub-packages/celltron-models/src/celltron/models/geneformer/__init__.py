"""Geneformer: a BERT over genes ranked by expression (Theodoris et al. 2023, doi:10.1038/s41586-023-06139-9)."""

from celltron.models.geneformer.config import GeneformerConfig
from celltron.models.geneformer.foreign_json import read_medians
from celltron.models.geneformer.huggingface import from_huggingface, to_huggingface
from celltron.models.geneformer.model import Geneformer, build_geneformer, make_transformer_config
from celltron.models.geneformer.model_file import MODEL_FILE_NAME, ModelShape, read_model_shape
from celltron.models.geneformer.nemo import from_nemo_tensors, list_nemo_shapes, read_nemo_shape
from celltron.models.geneformer.nemo_files import read_nemo_settings, read_nemo_vocabulary, vocabulary_of_genes
from celltron.models.geneformer.objective import masked_gene_loss
from celltron.models.geneformer.whole import WholeGeneformer, put_parameters, take_parameters

__all__ = [
    "MODEL_FILE_NAME",
    "Geneformer",
    "GeneformerConfig",
    "ModelShape",
    "WholeGeneformer",
    "build_geneformer",
    "from_huggingface",
    "from_nemo_tensors",
    "list_nemo_shapes",
    "make_transformer_config",
    "masked_gene_loss",
    "put_parameters",
    "read_medians",
    "read_model_shape",
    "read_nemo_settings",
    "read_nemo_shape",
    "read_nemo_vocabulary",
    "take_parameters",
    "to_huggingface",
    "vocabulary_of_genes",
]
