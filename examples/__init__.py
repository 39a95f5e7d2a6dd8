"""Programs that use cges_kernels. They run from the root of a checkout; the wheel holds the package alone.

``python -m examples.demo`` shows the whole way from a dense network to a small one.
``python -m examples.thesis`` repeats the experiments of the CGES thesis.
``python -m examples.transformer`` makes a transformer smaller.
``examples/small_resnet.py`` makes a ResNet smaller, and ``examples/train_with_*.py`` serve trainers.
These scripts have training loops of their own, because people copy them.

``pip install --no-build-isolation ".[examples]"`` in the checkout installs what they need. Other images than
scikit-learn's digits need torchvision too, in the version that fits the installed torch.
The demo and the thesis's experiments share ``examples/common``.
"""
