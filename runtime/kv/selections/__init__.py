"""Selections: one rule per file. Importing the package registers them under the plan kind `kv_select`."""

from __future__ import annotations

from planc.runtime.kv.selections.base import Selection
from planc.runtime.kv.selections.landmarks import Landmarks
from planc.runtime.kv.selections.pages import Pages

__all__ = ["Landmarks", "Pages", "Selection"]
