"""The Triton executor."""
