"""Floor 1: the networks and their mathematics, in plain torch. Import each file by its path."""
