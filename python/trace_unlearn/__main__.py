"""`python -m trace_unlearn`: the command `trace-unlearn`."""

import sys

from trace_unlearn.verbs.cli import main

if __name__ == "__main__":
    sys.exit(main())
