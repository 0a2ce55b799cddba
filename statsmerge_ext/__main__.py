"""``python -m statsmerge_ext``: the same as the ``statsmerge`` command."""

import sys

from statsmerge_ext.cli import main

sys.exit(main())
