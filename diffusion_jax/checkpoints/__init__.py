"""Checkpoints that verify, and which of them stay."""
