"""Programs that use cges_kernels, run from the repository's root.

``python -m examples.demo`` shows the whole way from a dense network to a small one.
``python -m examples.thesis`` repeats the experiments of the CGES thesis.
``python -m examples.transformer`` makes a transformer smaller.

They need ``pip install cges_kernels[examples]``, and torchvision for other images than scikit-learn's digits.
What they share is in ``examples/common``.
"""
