"""The `decode:` section of a plan."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from planc.runtime.context import DraftAttention
from planc.runtime.drafters import DrafterPart
from planc.runtime.errors import PlanError
from planc.runtime.masked import (
    CacheHook,
    EndHook,
    FusionHook,
    InputsHook,
    ModelHook,
    ReviseHook,
    SelectHook,
    Shape,
    StopHook,
    TopK,
    Truncate,
    Uncached,
    Whole,
    WindowHook,
)
from planc.runtime.masked.hooks import Hook
from planc.runtime.registry import item_of

if TYPE_CHECKING:
    DrafterItem = DrafterPart
    WindowItem = WindowHook
    CacheItem = CacheHook
    FusionItem = FusionHook
    SelectItem = SelectHook
    StopItem = StopHook
    ReviseItem = ReviseHook
    EndItem = EndHook
    InputsItem = InputsHook
    ModelItem = ModelHook
else:
    DrafterItem = item_of("drafter")
    WindowItem, CacheItem, FusionItem, SelectItem = (item_of(kind) for kind in ("window", "slot_cache", "fusion", "selection"))
    StopItem, ReviseItem, EndItem = (item_of(kind) for kind in ("stop_rule", "revision", "ending"))
    InputsItem, ModelItem = (item_of(kind) for kind in ("inputs", "model_choice"))


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


def _as_list(value: Any) -> Any:
    return value if isinstance(value, list | tuple) else [value]


def _as_names(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


class Sampling(_Section):
    """How a token is drawn. Under `acceptance: coupled` the text is a function of the prompt, these values and nothing else."""

    temperature: float = Field(0.0, ge=0.0, allow_inf_nan=False, description="0 is greedy")
    top_k: int = Field(0, ge=0, description="keep the k likeliest tokens; 0 keeps all")
    top_p: float = Field(1.0, gt=0.0, le=1.0, description="keep the fewest likeliest tokens that reach this probability")
    min_p: float = Field(0.0, ge=0.0, le=1.0, description="drop tokens below this share of the likeliest one's probability")
    repetition_penalty: float = Field(
        1.0, gt=0.0, allow_inf_nan=False, description="above 1 discourages tokens that already occur; 1 is off"
    )
    seed: int = Field(0, ge=0, lt=2**64)


class Tree(_Section):
    """How much is drafted per pass, and in what shape."""

    shape: Literal["auto", "chain", "tree"] = Field("auto", description="auto: trees where they keep the promised exactness")
    budget: Literal["auto"] | Annotated[int, Field(ge=0)] = Field("auto", description="draft rows per pass; auto decides by measured cost")
    depth: int = Field(32, ge=1, le=256, description="no guess is further ahead than this")


class Control(_Section):
    """How `budget: auto` settles how much of the drafts a pass verifies, plain decoding always being a choice (papers/70)."""

    policy: Literal["goodput", "confidence"] = Field(
        "goodput", description="goodput: most tokens per millisecond by the measured cost; confidence: every guess as likely as `threshold`"
    )
    estimate: Literal["guess", "position", "constant"] = Field(
        "guess",
        description="acceptance is learned for kinds of guesses, for each position of a chain, or as one rate for all of them; "
        "the last two settle one length for a whole batch before anything is drafted",
    )
    threshold: float = Field(0.3, gt=0.0, le=1.0, description="confidence: least probability that a guess is accepted")
    margin: float = Field(1.03, ge=1.0, le=2.0, description="what speculation has to promise, times the rate of plain decoding")
    interval: int = Field(1, ge=1, description="position, constant: passes between two decisions")
    smoothing: float = Field(0.05, gt=0.0, le=0.5, description="position, constant: weight of the latest guess in the rates")
    patience: int = Field(1024, ge=8, description="most passes without speculation before it is tried again")


class Transfer(_Section):
    """Moves the target's distribution towards the draft's before guesses are tested (papers/28). Not lossless, by design."""

    strength: float = Field(10.0, ge=0.0, le=1000.0, description="how far; 0 is plain speculative sampling")
    floor: float = Field(0.1, ge=0.0, le=1.0, description="tokens below this share of the draft's likeliest one are left alone")


class Speculative(_Section):
    """Draft and verify: several tokens per pass, the same text or, where draws are tested, text of the same distribution."""

    drafter: Annotated[tuple[DrafterItem, ...], BeforeValidator(_as_list), Field(min_length=1)]
    tree: Tree = Tree()
    controller: Control = Control()
    transfer: Transfer | None = Field(None, description="lossy: believe the draft in part, where it sees what matters more clearly")
    acceptance: Literal["coupled", "recursive", "block"] = Field(
        "coupled",
        description="coupled: the plain text, token by token; recursive and block test draws and accept more of them when sampling",
    )

    @model_validator(mode="after")
    def _rule_fits(self) -> Speculative:
        drawing = [part.key for part in self.drafter if part.draws != "nothing"]
        if self.acceptance != "coupled" and len(drawing) > 1:
            message = (
                f"{drawing[0]} and {drawing[1]} would both draw the guesses below one token, and `acceptance: {self.acceptance}` tests one"
            )
            raise _conflict(message, "keep one of them, or use `acceptance: coupled`")
        if self.acceptance == "block" and self.tree.shape == "tree":
            raise _conflict("`acceptance: block` verifies chains, and the tree has `shape: tree`", "use `acceptance: recursive`")
        if self.transfer is not None:
            if self.acceptance != "coupled":
                raise _conflict(f"`transfer` has a test of its own, beside `acceptance: {self.acceptance}`", "remove one of them")
            if not drawing or len(drawing) > 1 or self.tree.shape == "tree" or any(part.draws == "tree" for part in self.drafter):
                raise _conflict("`transfer` needs one drafter that draws a chain", "give a drafter `builder: chain`, and no tree")
        control = self.controller
        if self.tree.budget != "auto" and control != Control():
            raise _conflict(
                f"`budget: {self.tree.budget}` leaves a controller nothing to settle", "remove `controller`, or use `budget: auto`"
            )
        if control.estimate != "guess" and (control.policy == "confidence" or self.tree.shape == "tree"):
            other = "`policy: confidence` looks at guesses" if control.policy == "confidence" else "`shape: tree` has several at a position"
            raise _conflict(f"`estimate: {control.estimate}` is of chains by position, and {other}", "use `estimate: guess`")
        for part in self.drafter:
            if self.acceptance == "block" and part.draws == "tree":
                message = f"`acceptance: block` verifies chains, and the builder of {part.key} makes trees"
                raise _conflict(message, "use `builder: chain` or `acceptance: recursive`")
        return self


def _conflict(message: str, fix: str) -> PydanticCustomError:
    """A refusal that keeps its code and fix on the way to where the place in the plan is known."""
    error = PlanError("plan-conflict", message, fix=fix)
    return PydanticCustomError("part_refused", "{message}", {"message": message, "error": error})


class Batching(_Section):
    """Many sequences at once: what `serve` and lists of prompts share a pass with (papers/41)."""

    sequences: int = Field(4, ge=2, le=64, description="sequences that may share a pass")
    policy: Literal["lengths", "regroup"] = Field(
        "lengths", description="lengths: any sequences share a pass, each at its own length; regroup: only those with equal cached lengths"
    )
    window: int | None = Field(
        None, ge=2, le=256, description="regroup: sequences held at once, to choose groups from; left out: 4 times `sequences`"
    )
    patience: int = Field(8, ge=1, description="regroup: passes that a sequence may be left out of in a row")

    @model_validator(mode="after")
    def _wide(self) -> Batching:
        if self.window is not None and self.policy == "lengths":
            raise ValueError("`window` belongs to `policy: regroup`")
        if self.window is not None and self.window < self.sequences:
            raise ValueError(f"a window of {self.window} does not hold {self.sequences} sequences")
        return self


class Forced(_Section):
    """A token that stands in a slot of the field from the beginning."""

    offset: int = Field(ge=0, description="slot, counted from the first of the field")
    token: int | str = Field(description="its id, or its text")


class Masked(_Section):
    """Fill masked slots, several a pass: for diffusion language models. One loop; every entry fills a hook of it (papers/A2)."""

    window: WindowItem = Field(default_factory=Whole, description="which slots may be committed now")
    cache: CacheItem = Field(default_factory=Uncached, description="which slots are run through the network again")
    fusion: FusionItem | None = Field(None, description="what is done to logits before a token is proposed")
    score: Literal["prob", "margin", "neg_entropy", "random"] = Field("prob", description="what is called the confidence of a slot")
    select: SelectItem = Field(default_factory=TopK, description="which slots are committed")
    stop: StopItem | None = Field(None, description="when everything that is left is filled at once")
    revise: ReviseItem | None = Field(None, description="which decisions are taken back")
    end: EndItem | None = Field(None, description="what an end token means for what is left")
    inputs: InputsItem | None = Field(None, description="what slots read, where that is not what was decided there")
    models: ModelItem | None = Field(None, description="which of two models runs a window")
    second_model: str | None = Field(None, description="the other one: a name, a directory or an id, as for the first")
    forced: tuple[Forced, ...] = Field((), description="tokens that stand in the field whatever the model says")
    mask_token: int | None = Field(None, ge=0, description="id of the mask token, where the model does not say it")

    @property
    def by_name(self) -> dict[str, Hook | None]:
        """The hooks by the names that the loop has for them."""
        names = ("window", "cache", "fusion", "select", "stop", "revise", "end", "inputs", "models")
        return {name: getattr(self, name) for name in names}

    @property
    def hooks(self) -> tuple[Hook, ...]:
        """Those that are filled."""
        return tuple(hook for hook in self.by_name.values() if hook is not None)

    @model_validator(mode="after")
    def _fits(self) -> Masked:
        if self.forced and isinstance(self.end, Truncate):
            raise _conflict("`forced` tokens have fixed places, and `truncate` may cut the canvas before them", "remove one of them")
        if (self.models is None) != (self.second_model is None):
            raise _conflict("`models` chooses between two, the second of which is `second_model`", "give both or neither")
        return self

    def check(self, field: int) -> None:
        """Raises PlanError[plan-conflict] where a field of so many slots cannot be filled this way."""
        shape = Shape(field, self.window.blocks(field))
        for hook in self.hooks:
            hook.check(shape)


class Decode(_Section):
    """How text is generated."""

    max_new_tokens: int = Field(256, ge=1)
    min_rows: Literal["auto"] | Annotated[int, Field(ge=1)] = Field("auto", description="rows that every pass has at least")
    sampling: Sampling = Sampling()
    stop: Annotated[tuple[Annotated[str, Field(min_length=1)], ...], BeforeValidator(_as_names)] = Field(
        (), description="texts that end generation"
    )
    speculative: Speculative | None = None
    batching: Batching | None = None
    masked: Masked | None = Field(None, description="for models that fill masked slots in place of writing from left to right")
    context: DraftAttention | None = Field(None, description="lossy: shorten prompts to what the draft model attends to (papers/87)")

    @model_validator(mode="after")
    def _one_loop(self) -> Decode:
        if self.masked is None:
            return self
        if self.speculative is not None or self.batching is not None:
            other = "speculative" if self.speculative is not None else "batching"
            raise _conflict(f"`masked` fills slots, and `{other}` is for loops that write from left to right", f"remove `{other}`")
        if self.sampling.repetition_penalty != 1.0:
            raise _conflict("`masked` knows no repetition penalty", "remove `repetition_penalty`")
        if self.sampling.temperature > 0.0 and self.masked.cache.by_layer:
            raise _conflict(
                f"`{self.masked.cache.key}` runs layers one by one and returns no logits to sample from", "use `temperature: 0`"
            )
        if "max_new_tokens" in self.model_fields_set:
            try:
                self.masked.check(self.max_new_tokens)
            except PlanError as error:
                raise _conflict(error.message, error.fix or "") from error
        return self

    @model_validator(mode="after")
    def _draft_reads(self) -> Decode:
        drafters = self.speculative.drafter if self.speculative is not None else ()
        if self.context is None:
            return self
        if not any(part.key == "draft_model" for part in drafters):
            raise _conflict("`context` asks a draft model what matters, and the plan has none", "add the drafter draft_model")
        if any(getattr(part, "fuzzy", ()) for part in drafters):
            raise _conflict("`context` asks the draft model's cache, which its `fuzzy` form would share", "remove `fuzzy` or `context`")
        if self.batching is not None:
            raise _conflict("`context` reads prompts before they are served, one by one", "remove `batching` or `context`")
        return self

    def same_text(self, temperature: float | None = None) -> bool:
        """Whether drafting leaves the text of a seed as it is, at this temperature (default: the plan's), and not just its distribution."""
        temperature = self.sampling.temperature if temperature is None else temperature
        return self.speculative is None or self.speculative.acceptance == "coupled" or temperature == 0.0

    @property
    def batch_sizes(self) -> tuple[int, ...]:
        """Sizes of batches whose cost matters."""
        return (1,) if self.batching is None else (1, self.batching.sequences)
