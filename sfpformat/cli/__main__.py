"""Runs the command ``sfp`` as ``python -m sfpformat.cli``."""

import sys

from . import main

sys.exit(main())
