"""From a configuration to functions: network, training step, chain."""
