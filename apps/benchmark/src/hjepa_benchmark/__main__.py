"""`python -m hjepa_benchmark`."""

import sys

from hjepa_benchmark.cli import main

if __name__ == "__main__":
    sys.exit(main())
