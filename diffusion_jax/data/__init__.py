"""Data sets: found by name or path, read, and in which order a step sees them."""
