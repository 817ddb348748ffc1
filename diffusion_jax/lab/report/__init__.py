"""What runs have become: read from their folders, compared, and drawn as one page."""
