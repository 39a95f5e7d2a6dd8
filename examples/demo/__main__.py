"""``python -m examples.demo``."""

import sys

from .cli import main

if __name__ == "__main__":  # worker processes may import this module too
    sys.exit(main())
