"""Builders: how a drafter with a distribution turns it into a tree. Importing this package registers them under the plan kind `builder`."""

from __future__ import annotations

from planc.runtime.builders.base import BuilderItem, BuilderPart
from planc.runtime.builders.beam import Beam
from planc.runtime.builders.chain import Chain
from planc.runtime.builders.constant import Constant
from planc.runtime.builders.dynamic import Dynamic
from planc.runtime.builders.source import Source
from planc.runtime.builders.static import Static

__all__ = ["Beam", "BuilderItem", "BuilderPart", "Chain", "Constant", "Dynamic", "Source", "Static"]
