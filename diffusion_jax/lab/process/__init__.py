"""A command as a process: arguments, hosts, signals, progress."""
