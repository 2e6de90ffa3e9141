"""`python -m onward` is the `onward` command."""

import sys

from onward.lab.cli import main

sys.exit(main())
