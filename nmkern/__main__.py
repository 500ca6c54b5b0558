"""``python -m nmkern``: the command line, as the ``nmkern`` script runs it."""

import sys

from nmkern.cli import main

if __name__ == "__main__":
    sys.exit(main())
