"""Sources of counts, one module a file format, all with the face that `celltron.cells.ingest.source` describes."""
