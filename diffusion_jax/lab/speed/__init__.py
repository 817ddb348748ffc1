"""Measures speed: arithmetic, compiled programs, peers."""
