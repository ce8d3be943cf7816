"""Paper 49, Hydra: the working conditions of its card, with heads for SmolLM2-135M trained by `planc fit`, and Medusa's as the control."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

import planc
from planc.backends.reference import run
from planc.compiler.heads.fit import untrained
from planc.compiler.heads.states import States, states_of_texts
from planc.compiler.heads.texts import Texts
from planc.compiler.heads.train import LOGITS
from planc.compiler.papers import ROOT, Item, paper
from planc.compiler.plan import Plan
from planc.compiler.program import Program
from planc.compiler.store import open_plan
from planc.runtime.builders import BuilderPart, Static
from planc.runtime.builders.static import best_template
from planc.runtime.decode import Speculative, Tree
from planc.runtime.drafters import Context, DraftHead, Loaded
from planc.runtime.drafters.head_source import TailSource
from planc.runtime.engine import Cache, Engine, Outputs, Step
from planc.runtime.executable import Executable
from planc.runtime.trees import Draft
from planc_paper_checks.common import MIXED, MODEL, Played, answers, chats, equal, played

PLAN = ROOT / "examples/papers/49-hydra.yaml"
MEDUSA = ROOT / "examples/heads/medusa-smollm2-135m.safetensors"
PROMPTS, TOKENS = 6, 64
_RATES = (0.4, 0.15, 0.08, 0.05, 0.04, 0.03, 0.02, 0.02, 0.01, 0.01)  # of ranks; what the trees are made for, whoever fills them


@paper(49)
def hydra() -> Iterator[Item]:
    """Every condition of the card but the sixth, which is of a prefix layer."""
    exe, _ = open_plan(PLAN, MODEL)
    plan = Plan.from_yaml(PLAN)
    assert plan.decode.speculative is not None
    [part] = plan.decode.speculative.drafter
    assert isinstance(part, DraftHead)
    trees = {count: Static(template=best_template(_RATES, count, part.heads)) for count in (63, 15)}
    control = DraftHead(file=str(MEDUSA), body="mlp", heads=part.heads, fuse="none", builder=trees[15])
    tree_exe = _with_trees(plan, control)
    prompts = chats(exe, MIXED, PROMPTS)
    plain = answers(exe.plain(), prompts, TOKENS)
    heads = {"hydra": exe.models["head"], "medusa": tree_exe.models["head"]}
    yield _identical(exe, tree_exe, part, trees[15], prompts[:4], plain)
    texts = [(ids, made.ids) for ids, made in zip(prompts, plain, strict=True)]
    with tempfile.TemporaryDirectory() as folder:
        whole = Texts(tuple(np.array(a + b, dtype=np.int64) for a, b in texts), tuple(len(a) for a, _ in texts))
        states = states_of_texts(exe.engine, whole, Path(folder), lambda done, total: None)
    yield _order(heads["hydra"], trees[63], texts[0], states[0])
    yield _reduces(part, control, states)
    drafts = {
        f"{name} {count}": _replay(model, trees[count], texts, states, count, conditioned=name == "hydra")
        for name, model in heads.items()
        for count in trees
    }
    yield _conditioned(heads, texts, states, drafts)
    yield Item(
        5,
        "tokens per pass >= 1.7 with 63 guesses and >= 1.4 with 15",
        drafts["hydra 63"].per_pass >= 1.7 and drafts["hydra 15"].per_pass >= 1.4,
        {name: round(each.per_pass, 4) for name, each in drafts.items()},
    )


def _with_trees(plan: Plan, head: DraftHead) -> Executable:
    """The same target with attention whose rows do not depend on their siblings, and the other head."""
    decode = plan.decode.model_copy(update={"speculative": Speculative(drafter=(head,), tree=Tree(shape="tree", budget=15))})
    exe = planc.compile(MODEL, plan.model_copy(update={"decode": decode}), measure=False)
    assert isinstance(exe, Executable)
    return exe


class _Random(Engine):
    """A head that says anything."""

    def __init__(self, engine: Engine) -> None:
        self.engine, self.spec, self._rng = engine, engine.spec, np.random.default_rng(0)

    def new_cache(self, batch: int, capacity: int) -> Cache:
        return self.engine.new_cache(batch, capacity)

    def forward(self, cache: Cache, step: Step, *, logits: bool = False, top_k: bool = False) -> Outputs:
        made = self.engine.forward(cache, step, logits=logits, top_k=top_k)
        assert made.logits is not None
        return replace(made, logits=self._rng.normal(size=made.logits.shape).astype(np.float32))


def _identical(
    exe: Executable, tree_exe: Executable, part: DraftHead, builder: BuilderPart, prompts: list[list[int]], plain: list[Any]
) -> Item:
    trained = exe.models["head"]
    wild = Loaded(_Random(trained.engine), trained.capacity, levels=tuple(_Random(level) for level in trained.levels))
    branching = answers(tree_exe.plain(), prompts, TOKENS)
    same = {}
    for name, model in (("trained", trained), ("random", wild)):
        for shape, base, wanted in (("chain", exe, plain[: len(prompts)]), ("tree", tree_exe, branching)):
            head = part.model_copy(update={"artifact": "head", "min_p": 0.0, "builder": builder if shape == "tree" else None})
            speculative = Speculative(drafter=(head,), tree=Tree(shape=shape, budget=15 if shape == "tree" else part.heads))  # type: ignore[arg-type]
            decode = base.decode.model_copy(update={"speculative": speculative, "min_rows": base.min_rows})
            variant = Executable(base.engine, base.text, decode, base.contract, base.manifest, base.directory, {"head": model})
            same[f"{name} {shape}"] = equal(answers(variant, prompts, TOKENS), wanted)
    return Item(
        1, "greedy text is that without drafts: trained and random heads, chain and tree", set(same.values()) == {len(prompts)}, same
    )


def _grown(model: Loaded, builder: Static, text: tuple[list[int], list[int]], states: States) -> Draft:
    """The tree behind the first token of an answer."""
    prompt, answer = text
    source = TailSource(model)
    source.observe(0, states[: len(prompt)].astype(np.float32))
    draft = Draft(answer[0])
    builder.grow(source, Context(0, [*prompt, answer[0]], 63, 16), draft, "draft_head")
    return draft


def _order(model: Loaded, builder: Static, text: tuple[list[int], list[int]], states: States) -> Item:
    draft = _grown(model, builder, text, states)
    ranks: list[tuple[int, ...]] = [()]
    for row in range(1, len(draft)):
        parent = draft.parents[row]
        ranks.append((*ranks[parent], list(draft.children[parent].values()).index(row)))
    assert builder.template is not None
    levels = [len(path) for path in ranks]
    figures = {"guesses": len(draft) - 1, "levels": [levels.count(depth) for depth in range(1, max(levels) + 1)]}
    passed = set(ranks[1:]) == set(builder.template) and levels == sorted(levels) and len(draft) == 64
    return Item(2, "the flat list of guesses is the tree: every path rebuilt, level by level", passed, figures)


def _reduces(part: DraftHead, control: DraftHead, states: list[States]) -> Item:
    """Trained heads of Medusa, and heads of Hydra that have the same numbers and zeros for all embeddings."""
    medusa, hydra = (untrained(MODEL, Plan.from_yaml(PLAN), each)[0] for each in (control, part))
    trained = {name: value.float() for name, value in load_file(MEDUSA).items()}
    read, same, ids = torch.from_numpy(states[0][None].astype(np.float32)), 0, torch.full((1, len(states[0])), 5)
    apart = 0.0
    width = read.shape[-1]
    for level, (one, other) in enumerate(zip(medusa, hydra, strict=True)):
        want = _vectors(_loaded(one, trained), ids, read)
        tokens = torch.randn(1, len(states[0]), level * width, generator=torch.Generator().manual_seed(level))
        have = _vectors(_loaded(other, trained), ids, torch.cat([read, tokens], -1))
        apart, same = (
            max(apart, float((have - want).abs().max() / want.abs().max())),
            same + int(torch.allclose(have, want, rtol=1e-4, atol=1e-3)),
        )
    return Item(
        3, "heads that ignore the embeddings are those of Medusa", same == part.heads, {"heads": part.heads, "same": same, "apart": apart}
    )


def _loaded(program: Program, trained: dict[str, Tensor]) -> Program:
    """With the numbers of a file, and zeros where the program reads more than the file's does."""
    values = {}
    for name, value in program.params.items():
        given = trained.get(name)
        if given is not None:
            values[name] = given if given.shape == value.shape else torch.cat([given, torch.zeros_like(value[:, given.shape[1] :])], 1)
    return program.replace(params={**program.params, **values})


def _vectors(program: Program, ids: Tensor, states: Tensor) -> Tensor:
    return run(program, {"input_ids": ids, "position_ids": torch.zeros_like(ids), "states": states})[LOGITS]


def _replay(
    model: Loaded, builder: Static, texts: list[tuple[list[int], list[int]]], states: list[States], count: int, *, conditioned: bool
) -> Played:
    source = TailSource(model, conditioned=conditioned)

    def show(text: int, length: int) -> None:
        source.observe(0, states[text][: length - 1].astype(np.float32))

    return played(source, builder, texts, count, see=show, depth=source.room(()))


def _conditioned(
    heads: dict[str, Loaded], texts: list[tuple[list[int], list[int]]], states: list[States], drafts: dict[str, Played]
) -> Item:
    found = {name: _agreement(model, texts, states, conditioned=name == "hydra") for name, model in heads.items()}
    ahead = found["hydra"].given[1] - found["medusa"].given[1]
    gains = {count: round(drafts[f"hydra {count}"].per_pass - drafts[f"medusa {count}"].per_pass, 4) for count in (63, 15)}
    figures: dict[str, Any] = {name: {"right": [round(x, 4) for x in each.given]} for name, each in found.items()}
    return Item(
        4,
        "the second guess is right >= 5 points more often than unconditioned; >= 0.15 tokens per pass more on the same tree",
        ahead >= 0.05 and max(gains.values()) >= 0.15,
        {**figures, "ahead": round(ahead, 4), "more_per_pass": gains, "places": found["hydra"].places},
    )


@dataclass(frozen=True)
class _Agreement:
    """Share of places where guess i is the target's token, the tokens before it being the target's, by i; and how many places."""

    given: tuple[float, ...]
    places: int


def _agreement(model: Loaded, texts: list[tuple[list[int], list[int]]], states: list[States], *, conditioned: bool) -> _Agreement:
    source = TailSource(model, conditioned=conditioned)
    depth = source.room(())
    right, places = np.zeros(depth), 0
    for (prompt, answer), known in zip(texts, states, strict=True):
        for done in range(1, len(answer) - depth):
            text, after = [*prompt, *answer[:done]], answer[done : done + depth]
            source.observe(0, known[: len(text) - 1].astype(np.float32))
            draft, row, logits = Draft(text[-1]), 0, source.begin(text)
            for level, token in enumerate(after):
                right[level] += int(logits.argmax()) == token
                row = draft.add(row, token, ("text",), 1.0)
                if level + 1 < depth:
                    [logits] = source.expand(draft, [row])
            places += 1
    return _Agreement(tuple((right / places).tolist()), places)
