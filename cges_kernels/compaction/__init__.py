"""compact(): from a network with dead weights to a smaller dense one that computes the same."""
