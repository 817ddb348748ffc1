"""Configurations: their fields, what must hold, and how they are read."""
