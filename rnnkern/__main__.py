"""``python -m rnnkern`` is the command ``rnnkern``."""

import sys

from rnnkern.bench.cli import main

sys.exit(main())
