"""`python -m hear_ssam` is `hear-ssam`."""

import sys

from .cli import main

sys.exit(main())
