"""How fast it is: arithmetic, compiled programs, peers."""
