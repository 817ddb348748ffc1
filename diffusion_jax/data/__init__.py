"""Data sets: found by name or path, read, and shuffled."""
