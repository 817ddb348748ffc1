"""Trained networks in files of any kind, and what is known of them."""
