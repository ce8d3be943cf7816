"""What a plan says about its search: the section `search` and the spaces that it may name."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, field_validator, model_validator

from planc.compiler.search.budget import Budget
from planc.runtime.errors import PlanError
from planc.runtime.registry import PlanPart, item_of

if TYPE_CHECKING:
    from planc.compiler.plan import Plan

    SpaceItem = PlanPart
else:
    SpaceItem = item_of("space")


class Space(PlanPart):
    """Units of the model and the levels that each may take."""

    kind: ClassVar[str] = "space"


class Drop(Space):
    """Which attentions and MLPs, or whole layers, are left out; becomes a pass `skip_layers`."""

    conflicts: ClassVar[tuple[str, ...]] = ("drop",)
    unit: Literal["sublayer", "attention", "mlp", "layer"] = Field("sublayer", description="what is left out on its own")
    keep: tuple[int, ...] = Field((), description="layers that stay whole")


class Choose(Space):
    """Which value an option of a pass takes for each module."""

    conflicts: ClassVar[tuple[str, ...]] = ("choose",)
    option: str = Field(
        pattern=r"^\w+\.\w+$", description="PASS.OPTION, an option of a pass in the plan that maps module patterns to values"
    )
    levels: tuple[str | int | float, ...] = Field(min_length=2, description="the values, best quality first")
    modules: str = Field("*", description="pattern of the modules that are searched; the others stay as the pass says")

    @property
    def pass_key(self) -> str:
        """The pass whose option it is."""
        return self.option.partition(".")[0]

    @property
    def field(self) -> str:
        """The name of the option."""
        return self.option.partition(".")[2]

    def uniform(self, part: PlanPart, level: Any) -> PlanPart:
        """The pass with one level for every module."""
        return type(part)(**{**part.model_dump(exclude_defaults=True), self.field: {"*": level}})


class Round(BaseModel):
    """One selection: how many tokens candidates are compared on, and how many of them survive."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    tokens: PositiveInt
    survivors: PositiveInt


class Search(BaseModel):
    """The section `search` of a plan: what is left open, and how `planc search` settles it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    space: tuple[SpaceItem, ...] = Field(min_length=1, description="what is searched")
    budget: str | None = Field(
        None, description="what the model may be: `75% params`, `60 MB`, `4.0 ms`, `26 attention, 26 mlp`; several bounds with commas"
    )
    generations: PositiveInt = Field(40, description="rounds of mutation and selection")
    offspring: PositiveInt = Field(16, description="mutants of the best plan in a generation")
    starts: PositiveInt = Field(16, description="random plans within the budget; the best of them is where the evolution starts")
    selection: tuple[Round, ...] = Field(
        (Round(tokens=512, survivors=2), Round(tokens=2048, survivors=1)),
        min_length=1,
        validate_default=True,
        description="the selections of a generation: each compares the survivors of the one before on more text",
    )
    length: int = Field(256, ge=2, description="tokens per piece of text")
    precision: Literal["float32", "bfloat16"] = Field(
        "float32",
        description="bfloat16 is several times as fast on a CPU that has it, and too coarse for differences as small as 8 bits make",
    )

    @field_validator("budget")
    @classmethod
    def _readable(cls, text: str | None) -> str | None:
        if text is not None:
            Budget.parse(text)
        return text

    @model_validator(mode="after")
    def _narrowing(self) -> Search:
        counts = [self.offspring, *(round_.survivors for round_ in self.selection)]
        if counts[-1] != 1 or any(b > a for a, b in zip(counts, counts[1:], strict=False)):
            raise ValueError("`selection` must narrow the offspring down to 1 survivor")
        return self


def check_search(plan: Plan) -> None:
    """Refuse a search that does not fit the plan's passes, before anything is loaded. Raises PlanError with the place."""
    assert plan.search is not None
    for index, space in enumerate(plan.search.space):
        if not isinstance(space, Choose):
            continue
        place = plan.where("search", "space", index) or f"search.space[{index}]"
        part = next((part for part in plan.passes if part.key == space.pass_key), None)
        if part is None:
            raise PlanError(
                "plan-requires", f"the search needs the pass {space.pass_key}", plan=place, fix=f"add {space.pass_key} to the passes"
            )
        if space.field not in type(part).model_fields:
            raise PlanError("plan-unknown-field", f"{part.key} has no option {space.field!r}", plan=place)
        for level in space.levels:
            try:
                space.uniform(part, level)
            except ValueError as error:
                message = f"{space.option} does not take {level!r} for a module: {str(error).splitlines()[-2].strip()}"
                raise PlanError("plan-bad-value", message, plan=place) from None


def check_closed(plan: Plan) -> None:
    """Raise PlanError[search-open] for a plan that leaves choices to a search."""
    if plan.search is not None:
        message = "the plan leaves choices open, so it cannot be compiled"
        raise PlanError(
            "search-open", message, plan=plan.where("search") or "search", fix="run `planc search` and use the plan that it writes"
        )
