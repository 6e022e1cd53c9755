"""Scores of a checkpoint: tasks over one's own rows, public benchmarks from their files, behind `vlmoe evaluate`."""
