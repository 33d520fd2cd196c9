"""What a layout costs before anything runs: memory, communication and time, from formulas; knows no model."""
