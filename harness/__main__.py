"""`python -m harness`."""

import signal
import sys

if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until `main` is there: an end without a traceback

from harness.cli import main

sys.exit(main())
