"""Other people's networks: their names of weights and what they say of themselves."""
