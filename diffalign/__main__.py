"""`python -m diffalign` and `accelerate launch -m diffalign`."""

import sys

from diffalign.cli import main

sys.exit(main())
