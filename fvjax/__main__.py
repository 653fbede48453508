"""`python -m fvjax`: see `fvjax.commands`."""

import sys

from fvjax.commands import main

sys.exit(main())
