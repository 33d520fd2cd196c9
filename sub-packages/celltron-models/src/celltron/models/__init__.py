"""Models: one folder each, the shared layers in `layers`."""
