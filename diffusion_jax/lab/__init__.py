"""What commands and notebooks share: configurations, runs, trained networks."""
