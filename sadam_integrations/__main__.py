"""``python -m sadam_integrations`` is the ``sadam`` command."""

import sys

from sadam_integrations.cli import main

sys.exit(main())
