"""`python -m hjepa_pretrain`, the form that torchrun starts."""

import sys

from hjepa_pretrain.cli import main

if __name__ == "__main__":
    sys.exit(main())
