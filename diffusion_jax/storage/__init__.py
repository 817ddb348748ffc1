"""Files: replaced whole, unpacked, downloaded; tensors by name; and bars to wait by."""
