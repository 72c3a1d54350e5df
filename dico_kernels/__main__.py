"""``python -m dico_kernels``."""

import sys

from dico_kernels.cli import main

sys.exit(main())
