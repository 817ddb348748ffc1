"""Files: replaced whole, unpacked, downloaded, and tensors by name."""
