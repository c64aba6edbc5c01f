"""`python -m thinned` is the command `thinned`."""

import sys

from thinned.cli import main

if __name__ == "__main__":
    # A shell completes a command and no module.
    main("thinned" if "completion" in " ".join(sys.argv[1:2]) else "python -m thinned")
