"""Draws images by a trained network: samples, edits, figures."""
