"""`python -m onward` is the `onward` command."""

import sys

from onward.lab.command import main

sys.exit(main())
