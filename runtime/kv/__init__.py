"""Key/value caches with policies: how rows are kept (`stores`), which are read (`selections`) and which stay (`evictions`). numpy only."""

from __future__ import annotations

from planc.runtime.kv.cache import PolicyCache
from planc.runtime.kv.layer import Layer, LayerSpec
from planc.runtime.kv.policy import KvPolicy, Streaming
from planc.runtime.kv.rope import Rope

__all__ = ["KvPolicy", "Layer", "LayerSpec", "PolicyCache", "Rope", "Streaming"]
