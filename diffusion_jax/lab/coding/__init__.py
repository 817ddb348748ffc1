"""Trained networks as codecs: fitted, found again, and what goes in and comes out."""
