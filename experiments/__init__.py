"""Commands: configurations, loops, paths and prints. One command a file."""
