"""Bytes of images and back, by a trained network that every machine reads alike."""
