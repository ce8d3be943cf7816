"""Evictions: one score per file. Importing the package registers them under the plan kind `kv_evict`."""

from __future__ import annotations

from planc.runtime.kv.evictions.attention_window import AttentionWindow
from planc.runtime.kv.evictions.base import Eviction
from planc.runtime.kv.evictions.lookahead import Lookahead
from planc.runtime.kv.evictions.recent import Recent

__all__ = ["AttentionWindow", "Eviction", "Lookahead", "Recent"]
