"""`python -m trainer …` is `trainer …`."""

from __future__ import annotations

import sys

from trainer.commands import main

if __name__ == "__main__":
    sys.exit(main())
