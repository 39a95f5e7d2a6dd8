"""The executors: which of them serves a tensor, and the plans by which they step parameters."""
