"""``python -m rnnkern`` is the command ``rnnkern``."""

import sys

from rnnkern.cli import main

sys.exit(main())
