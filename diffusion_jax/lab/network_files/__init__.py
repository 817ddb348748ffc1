"""Reads and writes trained networks in files, with what is known of them."""
