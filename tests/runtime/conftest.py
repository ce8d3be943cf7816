"""Lets the tests of this directory import its `toy_engine` module, whatever pytest's import mode."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parent))
