"""Runs commands: arguments, hosts, signals, progress."""
