"""`python -m launcher`: the `xdl` command without its script."""

import sys

from launcher.cli import main

if __name__ == "__main__":
    sys.exit(main())
