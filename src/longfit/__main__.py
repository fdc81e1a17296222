"""``python -m longfit`` is ``longfit``."""

import sys

from longfit.cli.app import main

if __name__ == "__main__":
    sys.exit(main())
