"""The folder of a run: paths, lock, logs."""
