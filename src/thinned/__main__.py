"""`python -m thinned` is the command `thinned`."""

import sys

from thinned.cli import main

if __name__ == "__main__":
    # A shell can complete the command `thinned`, but not `python -m thinned`.
    main("thinned" if "completion" in " ".join(sys.argv[1:2]) else "python -m thinned")
