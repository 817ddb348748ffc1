"""What a trained network is measured by."""
