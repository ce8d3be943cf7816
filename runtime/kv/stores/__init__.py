"""Stores: one format per file. Importing the package registers them under the plan kind `kv_store`."""

from __future__ import annotations

from planc.runtime.kv.stores.base import BLOCK, PARTS, Part, Payload, Store, pick
from planc.runtime.kv.stores.bitmap import Bitmap
from planc.runtime.kv.stores.dense import Dense
from planc.runtime.kv.stores.gear import Gear
from planc.runtime.kv.stores.int8 import Int8
from planc.runtime.kv.stores.low_rank import LowRank
from planc.runtime.kv.stores.quantized import Quantized

__all__ = ["BLOCK", "PARTS", "Bitmap", "Dense", "Gear", "Int8", "LowRank", "Part", "Payload", "Quantized", "Store", "pick"]
