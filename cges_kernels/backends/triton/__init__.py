"""The Triton executor: kernels, and the host side that cuts tensors into tiles and launches."""
