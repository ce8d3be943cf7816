"""Lets the tests of this directory import the `models_tiny` module beside it, whatever pytest's import mode."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parent.parent))
