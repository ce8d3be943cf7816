"""What a drafter is: a plan part that builds a runtime object with `propose` and `update`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol, Self

from numpy.typing import NDArray

from planc.runtime.contract import CostTable
from planc.runtime.drafters.vocabulary import Vocabulary
from planc.runtime.engine import Cache, Engine, Floats, Ints
from planc.runtime.registry import PlanPart
from planc.runtime.sampling import Drawing
from planc.runtime.trees import Draft

#: (logits [V] of a row, guesses from the root to that row) -> the token that plain decoding would take there if these were its logits
Draw = Callable[[Floats, Sequence[int]], int]


def likeliest(logits: Floats, path: Sequence[int]) -> int:
    """The draw of greedy decoding: the lowest id on ties."""
    return int(logits.argmax())


@dataclass(slots=True)
class Context:
    """What a drafter may look at, for one sequence and round."""

    sequence: int  # row of the batch
    tokens: list[int]  # committed text, prompt included; the last one is pending. Read only
    budget: int  # guesses that are worth adding; more are not looked at
    depth: int  # deepest useful guess
    drawing: Drawing | None = None  # how to draw where the drafter has a distribution; None: greedily
    eos: frozenset[int] = frozenset()  # tokens that end the text; nothing follows them
    siblings: bool = True  # whether this round verifies several guesses for one place
    paused: bool = False  # speculation does not pay at the moment: guesses that cost a pass of their own are not worth making
    row_price: float = 0.0  # what a guess more costs in the target's pass, as a share of a plain pass: what it has to be worth
    pass_price: float = 0.0  # the same for a pass of the draft model
    longest: int = 0  # most tokens that the text may come to; 0 when that is not known
    draw: Draw = likeliest  # greedy, or with the noise of the place in the text (papers/A0 section 6)
    sampled: bool = False  # whether `draw` uses noise
    cache: Cache | None = None  # the target's; rows beyond its committed lengths are scratch until the next pass


@dataclass(slots=True)
class Verified:
    """What one pass showed about one sequence. After prefill the rows are prompt tokens and all of them are accepted."""

    sequence: int
    tokens: list[int]  # [R] token of each row, without padding
    depths: list[int]  # [R]
    rows: list[int]  # rows that are now committed, ascending
    chosen: list[int]  # the token committed after each of `rows`
    top_ids: Ints | None = None  # [R, K] likeliest successors of every row, rejected ones too; a view
    top_logits: Floats | None = None  # [R, K] of these; a view
    taps: dict[str, NDArray[Any]] = field(default_factory=dict)  # name -> [before + R, ...]; views
    past: int = 0  # tokens of the text before the first row that has taps
    before: int = 0  # rows of a prompt in the same pass before these: nobody asked for their outputs, but they have taps


class Drafter(Protocol):
    """Guesses text. May be shared by all sequences of a batch; must never affect what is committed, only how fast.

    One that runs passes of its own counts them in an attribute `passes`, for the statistics.
    """

    prompt_rows: int  # how many of the last prompt rows it wants in `update` with `top_ids`; 0 for none
    top_k: int  # width of `top_ids` that it uses; 0 when it needs none

    def start(self, sequence: int) -> None:
        """A new text begins in this row of the batch."""

    def propose(self, context: Context, draft: Draft) -> None:
        """Add guesses to `draft`, below its root or below guesses of the drafters before."""

    def update(self, verified: Verified) -> None:
        """Learn from a pass."""


@dataclass(frozen=True)
class Loaded:
    """A draft model that lies in the target's artifact."""

    engine: Engine
    capacity: int  # slots per sequence
    vocabulary: Vocabulary | None = None  # None: the target's own ids
    cost: CostTable | None = None  # of the passes that draft, as measured
    fuzzy: Engine | None = None  # a cheaper form of the model that works on the same caches (papers/14)
    levels: tuple[Engine, ...] = ()  # of a draft head with a graph for each depth: those behind the first

    @property
    def pass_ms(self) -> float | None:
        """What a pass of one row took when it was measured."""
        return None if self.cost is None else self.cost.ms(1, 128, 1)


@dataclass(frozen=True)
class Host:
    """The loaded target that a drafter is built for."""

    engine: Engine
    eos_ids: tuple[int, ...] = ()
    cost: CostTable | None = None  # of the target's passes, as measured
    min_rows: int = 1  # rows of the target's smallest pass
    models: Mapping[str, Loaded] = field(default_factory=dict)  # folder in the artifact -> draft model
    directory: Path | None = None  # of the artifact; None: paths of data files count from where the process runs


class DrafterPart(PlanPart):
    """A drafter as the plan names it."""

    kind: ClassVar[str] = "drafter"
    data_file: ClassVar[str | None] = None  # the option that names a file to read; compile copies that file into the artifact

    @property
    def needs_top_k(self) -> int:
        """Width of the top-k output that the graph must have; 0 for none."""
        return 0

    @property
    def draws(self) -> Literal["nothing", "chain", "tree"]:
        """What it draws from a distribution. A drafter with a builder draws what `builder.draws` says."""
        return "nothing"

    def build(self, vocab_size: int) -> Drafter:
        """The runtime object of a drafter that needs nothing of the target but the size of its vocabulary."""
        raise NotImplementedError(type(self).__name__)

    def build_for(self, host: Host) -> Drafter:
        """The runtime object for a loaded target; drafters that run passes of their own override this instead of `build`."""
        return self.located(host.directory).build(host.engine.spec.vocab_size)

    def located(self, folder: Path | None) -> Self:
        """The same with the path of its data file counted from `folder`."""
        if self.data_file is None or folder is None or (name := getattr(self, self.data_file)) is None:
            return self
        return self.model_copy(update={self.data_file: str(folder / Path(name).expanduser())})
