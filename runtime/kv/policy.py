"""The policy of a cache: how rows are kept x which are read x when they go (papers/A4 section 1)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from planc.runtime.errors import PlanError
from planc.runtime.kv.evictions import Eviction
from planc.runtime.kv.selections import Landmarks, Selection
from planc.runtime.kv.stores import BLOCK, Dense, Store
from planc.runtime.registry import item_of

if TYPE_CHECKING:
    StoreItem = Store
    SelectionItem = Selection
    EvictionItem = Eviction
else:
    StoreItem, SelectionItem, EvictionItem = item_of("kv_store"), item_of("kv_select"), item_of("kv_evict")


class Streaming(BaseModel):
    """Heads that see the first and the last tokens only, in memory that does not grow (papers/34; "DuoAttention")."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    share: float | None = Field(None, gt=0.0, le=1.0, description="share of all key/value heads, those that look back least on calibration")
    heads: tuple[tuple[int, ...], ...] | None = Field(None, description="the key/value heads of every layer, by number, instead of a share")
    sink: int = Field(64, ge=0, description="first tokens that stay visible")
    local: int = Field(128, ge=1, description="last tokens that are visible, at least; up to 64 more, because they go in blocks")

    @model_validator(mode="after")
    def _one_way(self) -> Self:
        if (self.share is None) == (self.heads is None):
            raise PlanError(
                "plan-bad-value", "streaming takes one of share and heads", fix="streaming: {share: 0.5} or {heads: [[0], [1, 2]]}"
            )
        return self


class KvPolicy(BaseModel):
    """What a cache does with rows that are no longer new.

    A prompt is read densely; when it ends, `evict` drops rows of it. From then on the last `window` tokens stay dense, and blocks of 64 that
    leave the window go to the `store`. `select` names what of the store is read; without it a pass reads all. Only committed tokens count, so
    nothing that is drafted and rejected leaves a trace, and blocks do not depend on how many tokens a pass committed.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    store: StoreItem | None = Field(None, description="format of blocks behind the window; left out: rows stay as and where they are")
    select: SelectionItem | None = Field(None, description="which stored rows are read; left out: all")
    evict: EvictionItem | None = Field(None, description="which rows of the prompt stay; left out: all")
    streaming: Streaming | None = Field(None, description="heads that see the first and the last tokens only")
    window: int = Field(64, ge=0, description="last tokens that are dense, at least; up to 64 more, because they go in blocks")
    sinks: int = Field(0, ge=0, description="first tokens that are never stored, selected or evicted")
    layers: tuple[int, ...] | None = Field(None, description="layers that have the policy; left out: all with unlimited attention")

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.neutral and self.streaming is None:
            raise _conflict("a cache policy that does nothing", "give it a store, a selection, an eviction or streaming heads")
        if self.store is not None and not self.store.in_graph and self.select is None:
            raise _conflict(f"all that {self.store.key} keeps would have to be read, and a graph cannot", "add `select: {landmarks: ...}`")
        if isinstance(self.select, Landmarks) and self.store is not None and not self.store.by_rows:
            message = f"landmarks pick chunks of 8 rows, and blocks in {self.store.key} can only be read as a whole"
            raise _conflict(message, "use `select: {pages: ...}`, or a store that keeps rows apart: dense, int8, bitmap, low_rank")
        if self.evict is not None and self.evict.window >= self.evict.capacity:
            message = f"a window of {self.evict.window} leaves nothing to choose in a capacity of {self.evict.capacity}"
            raise _conflict(message, "make the window smaller")
        if self.evict is not None and self.sinks > self.evict.capacity - self.evict.window:
            raise _conflict(f"{self.sinks} sinks do not fit into the capacity beside the window", "use fewer sinks")
        return self

    @property
    def neutral(self) -> bool:
        """Whether heads that do not stream keep and read all of it as in a plain cache."""
        return self.select is None and self.evict is None and self.kept is None

    @property
    def kept(self) -> Store | None:
        """The format of stored blocks; None where no row leaves the window."""
        if self.store == Dense() and self.select is None:
            return None
        return self.store if self.store is not None or self.select is None else Dense()

    @property
    def in_graph(self) -> bool:
        """Whether the graph itself reads stored blocks; otherwise what is selected lies beside the window, dense."""
        return self.kept is not None and self.select is None

    @property
    def prompt_rows(self) -> int:
        """Last rows of a prompt whose queries are needed."""
        return max(self.evict.window if self.evict is not None else 0, 1 if self.select is not None else 0)

    @property
    def guesses(self) -> int:
        """Tokens behind a prompt that have to be guessed before it is evicted from."""
        return self.evict.guesses if self.evict is not None else 0

    @property
    def longest_pass(self) -> int:
        """Most rows that a pass may commit without crossing a change of what is visible, at best."""
        return min(self.select.interval if self.select is not None else BLOCK, BLOCK)


def _conflict(message: str, fix: str) -> PlanError:
    return PlanError("plan-conflict", message, fix=fix)
