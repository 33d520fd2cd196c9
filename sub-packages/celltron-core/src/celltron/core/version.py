"""The version that every artefact names."""

__version__ = "0.1.0"
