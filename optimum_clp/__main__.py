"""`python -m optimum_clp`: the program `optimum-clp`."""

import sys

from .commands.clp import main

if __name__ == "__main__":
    sys.exit(main())
