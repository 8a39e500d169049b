"""`python -m vattention`: the program `vattention`."""

import sys

from vattention.cli import main

if __name__ == "__main__":
    sys.exit(main())
