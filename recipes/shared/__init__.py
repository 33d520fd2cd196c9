"""What several recipes and the command line share; no programs."""
