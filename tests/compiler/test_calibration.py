"""Statistics over calibration text, against hooks on the model itself."""

from __future__ import annotations

import torch
from models_tiny import close, eager, model, raised, token_ids
from torch import Tensor

from planc.compiler.calibration import mean_squares
from planc.compiler.dialect import OPS

aten = torch.ops.aten
IDS = token_ids(3, 17)


def test_equals_hooks_on_the_model() -> None:
    module, program = model("llama"), raised("llama")
    names = ["model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj", "lm_head"]
    seen: dict[str, Tensor] = {}
    modules = dict(module.named_modules())
    hooks = [
        modules[n].register_forward_pre_hook(lambda _, args, n=n: seen.update({n: args[0].double().pow(2).mean((0, 1))})) for n in names
    ]
    eager(module, IDS)
    for hook in hooks:
        hook.remove()
    inputs = {str(n.args[1].target).removesuffix(".weight"): n.args[0] for n in program.main.nodes if n.target is aten.linear.default}
    have = mean_squares(program, [inputs[n] for n in names], IDS)
    for name in names:
        assert have[inputs[name]].dtype == torch.float64
        close(have[inputs[name]], seen[name])


def test_the_order_of_text_does_not_matter() -> None:
    program = raised("llama")
    nodes = [n for n in program.main.nodes if n.target is OPS.rms_norm.default]
    one, two = mean_squares(program, nodes, IDS), mean_squares(program, nodes, IDS.flip(0))
    assert set(one) == set(nodes)
    for node in nodes:
        close(one[node], two[node], 1e-15)
    twice = mean_squares(program, nodes, torch.cat((IDS, IDS)))
    for node in nodes:
        close(twice[node], one[node], 1e-15)


def test_progress_and_nothing_to_watch() -> None:
    told: list[str] = []

    def progress(rows: Tensor, text: str) -> Tensor:
        told.append(text)
        return rows

    program = raised("llama")
    assert mean_squares(program, [], IDS) == {}
    mean_squares(program, [next(n for n in program.main.nodes if n.target is OPS.glu.default)], IDS, progress)
    assert told == ["calibrating"]
