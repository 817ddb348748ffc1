"""Training as a whole: from a configuration to a finished run."""
