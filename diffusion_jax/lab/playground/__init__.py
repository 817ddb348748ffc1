"""A trained network in the browser: its page, and what it may ask."""
