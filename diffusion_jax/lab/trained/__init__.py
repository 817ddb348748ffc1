"""A trained network: found, its weights chosen, its extras completed."""
