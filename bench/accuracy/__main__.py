"""``python -m bench.accuracy``."""

import sys

from .cli import main

if __name__ == "__main__":  # the worker processes import this module too
    sys.exit(main())
