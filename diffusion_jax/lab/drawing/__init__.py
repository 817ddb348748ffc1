"""Images drawn with a trained network: samples, edits, figures."""
