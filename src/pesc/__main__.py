"""`python -m pesc`: the command `pesc`."""

from __future__ import annotations

import sys

from pesc.cli import main

sys.exit(main())
