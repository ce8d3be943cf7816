"""The `decode:` section of a plan."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from planc.runtime.drafters import DrafterPart
from planc.runtime.errors import PlanError
from planc.runtime.registry import item_of

if TYPE_CHECKING:
    DrafterItem = DrafterPart
else:
    DrafterItem = item_of("drafter")


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


class Speculative(_Section):
    """Draft and verify: several tokens per pass, the same text or, where draws are tested, text of the same distribution."""

    drafter: Annotated[tuple[DrafterItem, ...], BeforeValidator(_as_list), Field(min_length=1)]
    tree: Tree = Tree()
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

    def same_text(self, temperature: float | None = None) -> bool:
        """Whether drafting leaves the text of a seed as it is, at this temperature (default: the plan's), and not just its distribution."""
        temperature = self.sampling.temperature if temperature is None else temperature
        return self.speculative is None or self.speculative.acceptance == "coupled" or temperature == 0.0

    @property
    def batch_sizes(self) -> tuple[int, ...]:
        """Sizes of batches whose cost matters."""
        return (1,) if self.batching is None else (1, self.batching.sequences)
