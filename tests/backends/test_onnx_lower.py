"""Lowering to ONNX: ops one by one against torch, quantised products against the reference, and what the files look like."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from models_tiny import FAMILIES, MAX_LENGTH, VOCAB, apply, close, decoding, info, make, raised
from torch import Tensor, nn
from torch.fx import Node

from planc.backends.onnx.lower import OPSET, lower
from planc.backends.reference import run
from planc.compiler.dialect import OPS
from planc.compiler.passbase import Context
from planc.compiler.program import Editor, ModelInfo, Program
from planc.compiler.raising import raise_program
from planc.compiler.trace import trace, trace_module
from planc.compiler.verify import verify
from planc.compiler.weight_forms import int8_rows, int_blocks
from planc.passes.fuse_projections import FuseProjections
from planc.passes.kv_cache import KvCache
from planc.passes.quantize_weights import QuantizeWeights
from planc.runtime.errors import CompileError

Ops = Literal["fast", "standard"]
aten = torch.ops.aten
DYNAMIC = torch.export.Dim.DYNAMIC


def onnx_run(program: Program, directory: Path, ops: Ops, **inputs: Tensor) -> dict[str, np.ndarray]:
    path = lower(program, directory, ops=ops, positions=MAX_LENGTH)
    options = ort.SessionOptions()
    options.log_severity_level = 3
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names = [o.name for o in session.get_outputs()]
    return dict(zip(names, session.run(names, {n: v.detach().numpy() for n, v in inputs.items()}), strict=True))


def program_of(function: Callable[..., Any], *inputs: Tensor) -> Program:
    """The program of a function of x (and y), batch and rows dynamic."""

    class Module(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Any:
            return function(x, y)

    sizes = tuple(dict.fromkeys(range(2), DYNAMIC) for _ in range(2))
    return trace_module(Module(), (inputs[0], inputs[-1]), ModelInfo("op", 0, 1), sizes)


X = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0))
Y = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(1))
LARGER_X, LARGER_Y = (torch.randn(4, 5, 8, generator=torch.Generator().manual_seed(s)) for s in (2, 3))

FUNCTIONS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "arithmetic": lambda x, y: (x + 2 * y - 1) / (y.abs() + 1) * 3,
    "alpha": lambda x, y: torch.add(x, y, alpha=2.5),
    "number first": lambda x, y: torch.add(torch.rsub(x, 1.0), y),
    "powers": lambda x, y: x.abs() ** 1.5 + torch.rsqrt(y.abs() + 1) + y.abs().sqrt(),
    "functions": lambda x, y: torch.tanh(x) + y.relu() - x.exp() + y.sigmoid() + x.cos() * y.sin() - torch.erf(x) - (-y),
    "activations": lambda x, y: F.silu(x) + F.gelu(y) + F.gelu(x, approximate="tanh"),
    "index select": lambda x, y: (x.index_select(-1, y.mean((0, 1)).topk(5)[1]), x.index_select(0, y.mean((1, 2)).topk(2)[1])),
    "gated": lambda x, y: F.silu(x) * y + F.gelu(y) * x + F.gelu(x, approximate="tanh") * y + x.relu() * y,
    "layer norm": lambda x, y: F.layer_norm(x, (8,), y.mean((0, 1)), y.sum((0, 1)), 1e-3) + F.layer_norm(y, (8,)),
    "view": lambda x, y: x.view(x.shape[0], x.shape[1], 2, 4).transpose(1, 2).reshape(x.shape[0], -1, 4),
    "flatten": lambda x, y: (x.flatten(0, 1) @ y.reshape(-1, 8).t()).unsqueeze(0).squeeze(0),
    "permute": lambda x, y: x.permute(2, 0, 1) + y.permute(2, 0, 1),
    "product": lambda x, y: torch.matmul(x, y.transpose(1, 2)),
    "bmm": lambda x, y: torch.bmm(x, y.transpose(1, 2)),
    "slice": lambda x, y: x[:, :, 1:5] + y[:, :, -4:] + x[..., ::2] - x[:, -1:, 3:7],
    "split": lambda x, y: torch.cat([*x.split([1, 2, 5], -1), *y.chunk(2, -1), *x.split(3, 2)], 2),
    "expand": lambda x, y: x[:, :1].expand(x.shape[0], x.shape[1], 8) * y,
    "reductions": lambda x, y: x.mean(-1, keepdim=True) + y.sum(-1, keepdim=True) + x.mean((0, 1)),
    "softmax": lambda x, y: torch.softmax(x, -1) + torch.softmax(y, 1),
    "choices": lambda x, y: (x.argmax(-1), *x.topk(3)),
    "types": lambda x, y: (x.to(torch.float64) * 2.0, (y * 10).to(torch.int64) + 1, x.half().float()),
    "several": lambda x, y: (x, x + y, x),
}


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("ops", ["fast", "standard"])
def test_ops(name: str, ops: Ops, tmp_path: Path) -> None:
    """Also at another batch and other rows than the traced ones."""
    function = FUNCTIONS[name]
    program = raise_program(program_of(function, X, Y))
    for x, y in ((X, Y), (LARGER_X, LARGER_Y)):
        want = function(x, y)
        have = onnx_run(program, tmp_path, ops, x=x, y=y)
        assert len(have) == (len(want) if isinstance(want, tuple) else 1)
        for h, w in zip(have.values(), want if isinstance(want, tuple) else (want,), strict=True):
            assert h.dtype == w.numpy().dtype
            close(h, w, 1e-5)


def test_an_op_without_lowering(tmp_path: Path) -> None:
    program = program_of(lambda x, y: torch.cumsum(x, 0) + y, X, Y)
    with pytest.raises(CompileError) as caught:
        lower(program, tmp_path, positions=1)
    assert caught.value.code == "lower-unsupported"
    assert "aten.cumsum" in caught.value.message
    assert "test_onnx_lower.py" in (caught.value.node or "")
    assert "reference" in (caught.value.fix or "")


# ---- quantised products ----


@cache
def nothing() -> Program:
    """A program with two dynamic sizes, to build others from without tracing."""
    return program_of(lambda x, y: x + y, X, Y)


def built(inputs: int, make: Callable[[Editor, Node], Node]) -> Program:
    """The program whose output is what `make` builds from the input x [B,R,inputs]."""
    edit = nothing().edit("test")
    old = edit.graph.find_nodes(op="placeholder")
    x = edit.input("input", torch.float32, *old[0].meta["val"].shape[:2], inputs)
    with edit.before(edit.graph.output_node()):
        edit.outputs(output=make(edit, x))
    program = edit.done(1, 1)
    for node in program.main.find_nodes(op="placeholder"):
        if node.target != "input":
            program.main.erase_node(node)
    verify(program, "test")
    return program


def product_of(weight: Tensor, bias: Tensor | None, part: QuantizeWeights) -> Program:
    """One quantised product of x [B,R,K]."""

    def make(edit: Editor, x: Node) -> Node:
        parameters = [edit.param("weight", weight)] + ([edit.param("bias", bias)] if bias is not None else [])
        return edit.call(aten.linear.default, x, *parameters)

    return part.apply(built(weight.shape[1], make), Context())


def some(*shape: int, seed: int, size: float = 1.0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * size


@pytest.mark.parametrize("ops", ["fast", "standard"])
@settings(max_examples=25, deadline=None)
@given(
    st.integers(1, 3),
    st.integers(1, 5),
    st.integers(1, 70),
    st.integers(1, 40),
    st.booleans(),
    st.sampled_from([1e-3, 1.0, 1e4]),
    st.integers(0, 99),
)
def test_int8_equals_the_reference(
    tmp_path_factory: pytest.TempPathFactory,
    ops: Ops,
    batch: int,
    rows: int,
    inputs: int,
    outputs: int,
    biased: bool,
    size: float,
    seed: int,
) -> None:
    bias = some(outputs, seed=seed + 2) if biased else None
    program = product_of(some(outputs, inputs, seed=seed), bias, QuantizeWeights(format="int8"))
    x = some(batch, rows, inputs, seed=seed + 1, size=size)
    x[0, 0] = 0.0
    have = onnx_run(program, tmp_path_factory.mktemp("int8"), ops, input=x)["output"]
    want = run(program, {"input": x})["output"]
    close(have, want, 1e-5)
    assert np.array_equal(have[0, 0], np.zeros(outputs, np.float32) if bias is None else bias.numpy())  # a row of zeros


@pytest.mark.parametrize("ops", ["fast", "standard"])
@pytest.mark.parametrize("biased", [False, True])
def test_int8_with_a_fixed_step_equals_the_reference(ops: Ops, biased: bool, tmp_path: Path) -> None:
    """One step for all rows; values beyond it are cut off alike."""
    weight, bias, step = some(9, 33, seed=1), some(9, seed=2) if biased else None, torch.tensor(0.01)

    def make(edit: Editor, x: Node) -> Node:
        steps, scale = int8_rows(weight).parts.values()
        assert steps is not None and scale is not None
        last = edit.param("bias", bias) if bias is not None else None
        return edit.call(OPS.linear_int8.default, x, edit.param("w", steps), edit.param("s", scale), last, edit.param("step", step))

    program, x = built(33, make), some(2, 4, 33, seed=3)
    assert float(x.abs().max()) > 1.28
    close(onnx_run(program, tmp_path, ops, input=x)["output"], run(program, {"input": x})["output"], 1e-5)


@pytest.mark.parametrize("ops", ["fast", "standard"])
def test_int8_sums_are_exact(ops: Ops, tmp_path: Path) -> None:
    """Whole numbers up to 127 are their own steps, so that the sums of products come out as they are."""
    random = torch.Generator().manual_seed(0)
    x, weight = (torch.randint(-127, 128, shape, generator=random).float() for shape in ((2, 5, 400), (30, 400)))
    x[..., 0], weight[:, 0] = 127, 127  # the largest of each row: scale 1
    have = onnx_run(product_of(weight, None, QuantizeWeights(format="int8")), tmp_path, ops, input=x)["output"]
    want = (x.double() @ weight.double().T).numpy()
    assert np.abs(want).max() > 2**17
    assert np.array_equal(np.rint(have), want)


@pytest.mark.parametrize("ops", ["fast", "standard"])
def test_int8_at_the_ends(ops: Ops, tmp_path: Path) -> None:
    """Rows of zeros, of one huge and of tiny values give finite numbers, and a weight row of zeros gives the bias."""
    weight, bias = some(6, 32, seed=0), some(6, seed=1)
    weight[2] = 0.0
    program = product_of(weight, bias, QuantizeWeights(format="int8"))
    x = torch.zeros(1, 4, 32)
    x[0, 1, 3], x[0, 2], x[0, 3] = 1e30, some(32, seed=2, size=1e-30), some(32, seed=3)
    have, want = onnx_run(program, tmp_path, ops, input=x)["output"], run(program, {"input": x})["output"]
    assert np.isfinite(have).all()
    for row in range(4):
        close(have[0, row], want[0, row], 1e-5)
    assert np.array_equal(have[0, :, 2], np.broadcast_to(bias[2].numpy(), 4))


def blocks_product(packed: Tensor, scales: Tensor, zeros: Tensor | None, bias: Tensor | None, bits: int, block: int) -> Program:
    """One product with weights in blocks that may have zero points."""

    def make(edit: Editor, x: Node) -> Node:
        given = (("packed", packed), ("scales", scales), ("zeros", zeros), ("bias", bias))
        return edit.call(OPS.linear_blocks.default, x, *(None if v is None else edit.param(name, v) for name, v in given), bits, block)

    return built(packed.shape[1] * block, make)


@pytest.mark.parametrize("ops", ["fast", "standard"])
@settings(max_examples=25, deadline=None)
@given(
    st.sampled_from([4, 8]),
    st.sampled_from([16, 32, 64, 128]),
    st.integers(1, 4),
    st.integers(1, 20),
    st.integers(1, 5),
    st.booleans(),
    st.booleans(),
    st.integers(0, 99),
)
def test_blocks_are_within_the_rounding_of_activations(
    tmp_path_factory: pytest.TempPathFactory,
    ops: Ops,
    bits: int,
    block: int,
    blocks: int,
    outputs: int,
    rows: int,
    shifted: bool,
    biased: bool,
    seed: int,
) -> None:
    """ONNX Runtime may round x to int8 per block: |error| <= sum_k |w_k| step/2, step = peak of the block / 127, where w_k counts its steps from the
    middle. With standard operators nothing is rounded."""
    packed, scales, _ = int_blocks(some(outputs, blocks * block, seed=seed), bits, block).parts.values()
    assert packed is not None and scales is not None
    zeros = torch.rand(outputs, blocks, generator=torch.Generator().manual_seed(seed)) * 2**bits if shifted else None
    bias = some(outputs, seed=seed + 2) if biased else None
    program = blocks_product(packed, scales, zeros, bias, bits, block)
    x = some(1, rows, blocks * block, seed=seed + 1)
    x[0, 0, :block] = 0.0
    have = onnx_run(program, tmp_path_factory.mktemp("blocks"), ops, input=x)["output"]
    want = run(program, {"input": x})["output"].numpy()
    middle = blocks_product(packed, scales, None, None, bits, block)
    weights = (
        run(middle, {"input": torch.eye(blocks * block)[None]})["output"][0].abs().T.reshape(outputs, blocks, block)
    )  # without zero points
    steps = x.reshape(rows, blocks, block).abs().amax(-1) / 127
    bound = (torch.einsum("rb,obk->ro", steps, weights) / 2).numpy() if ops == "fast" else np.zeros((rows, outputs))
    assert np.isfinite(have).all()
    assert (np.abs(have - want)[0] <= 1.01 * bound + 1e-5 * max(1.0, float(np.abs(want).max()))).all()


@pytest.mark.parametrize("ops", ["fast", "standard"])
def test_int8_embedding(ops: Ops, tmp_path: Path) -> None:
    table = nn.Embedding(11, 7)
    program = trace_module(table, (torch.zeros(2, 3, dtype=torch.int64),), ModelInfo("table", 0, 1), ({0: DYNAMIC, 1: DYNAMIC},))
    program = QuantizeWeights(format="int8").apply(program, Context())
    ids = torch.tensor([[3, 0, 10], [10, 10, 1]])
    steps, scale = int8_rows(table.weight.detach()).parts.values()
    assert steps is not None and scale is not None
    assert np.array_equal(onnx_run(program, tmp_path, ops, input_1=ids)["output"], (steps.float() * scale[:, None])[ids].numpy())


# ---- files ----


def ops_of(directory: Path) -> Counter[str]:
    return Counter(node.op_type for node in onnx.load(str(directory / "model.onnx"), load_external_data=False).graph.node)


@pytest.mark.parametrize("family", FAMILIES)
def test_standard_uses_standard_operators_only(family: str, tmp_path: Path) -> None:
    program = decoding(raised(family), "fused")
    if family in ("llama", "gpt2"):
        program = decoding(
            apply(raised(family), QuantizeWeights(format="int8", modules={"o_proj": "int8_blocks"} if family == "llama" else {})), "fused"
        )
    lower(program, tmp_path, ops="standard", positions=MAX_LENGTH)
    onnx.checker.check_model(str(tmp_path / "model.onnx"), full_check=True)  # knows no other operators
    graph = onnx.load(str(tmp_path / "model.onnx"), load_external_data=False)
    assert {node.domain for node in graph.graph.node} == {""}
    assert {o.domain: o.version for o in graph.opset_import}[""] == OPSET


def test_fast_uses_what_onnx_runtime_has(tmp_path: Path) -> None:
    program = apply(raised("llama"), FuseProjections())
    lower(decoding(program, "fused"), tmp_path, positions=MAX_LENGTH)
    have = ops_of(tmp_path)
    assert have["GroupQueryAttention"] == 2 and have["Softmax"] == have["Exp"] == 0
    assert have["SkipSimplifiedLayerNormalization"] == 4 and have["SimplifiedLayerNormalization"] == 1
    lower(decoding(program, "split"), tmp_path, positions=MAX_LENGTH)
    have = ops_of(tmp_path)
    assert have["GroupQueryAttention"] == 0 and have["Exp"] == 2
    lower(decoding(apply(program, QuantizeWeights(format="int8", modules={"o_proj": "int4_blocks"}))), tmp_path, positions=MAX_LENGTH)
    have = ops_of(tmp_path)
    assert (have["MatMulIntegerToFloat"], have["MatMulNBits"], have["MatMul"]) == (7, 2, 0)
    assert have["QuantizeLinear"] == 7  # one per value, however many products read it


def test_inputs_and_outputs(tmp_path: Path) -> None:
    program = decoding(raised("gemma3"), "fused")
    lower(program, tmp_path, positions=MAX_LENGTH)
    session = ort.InferenceSession(str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"])
    assert [i.name for i in session.get_inputs()] == list(program.inputs)
    assert [o.name for o in session.get_outputs()] == list(program.outputs)
    types = {i.name: i.type for i in session.get_inputs()}
    assert (types["input_ids"], types["bias.8"], types["past.3.key"]) == ("tensor(int64)", "tensor(float)", "tensor(float)")
    shapes = {i.name: i.shape for i in session.get_inputs()}
    batch, rows = shapes["input_ids"]
    assert isinstance(batch, str) and isinstance(rows, str)
    assert shapes["lengths"] == [batch] and shapes["logits_from"] == [1]
    assert shapes["past.0.value"][:2] == [batch, 2] and shapes["past.0.value"][3] == 16
    assert shapes["bias"][:3] == [batch, 1, rows]


@pytest.mark.parametrize("form", ["none", "int8"])
def test_tied_weights_are_stored_once(form: str, tmp_path: Path) -> None:
    sizes = []
    for tied in (True, False):
        program = raise_program(trace(make("llama", tie_word_embeddings=tied, num_hidden_layers=1), info("llama")))
        program = apply(program, QuantizeWeights(format="int8")) if form == "int8" else program
        lower(apply(program, KvCache(trees="none")), tmp_path, positions=MAX_LENGTH)
        sizes.append((tmp_path / "model.weights").stat().st_size)
    table = VOCAB * 32 * (4 if form == "none" else 1)
    assert (sizes[1] - sizes[0] > table / 2) == (form == "none")
    graph = onnx.load(str(tmp_path / "model.onnx"), load_external_data=False)
    large = [t for t in graph.graph.initializer if np.prod(t.dims) > 256]
    assert large and all(t.data_location == onnx.TensorProto.EXTERNAL for t in large)


def test_no_parameter_is_stored_that_nobody_reads(tmp_path: Path) -> None:
    lower(decoding(raised("qwen2")), tmp_path, positions=MAX_LENGTH)
    graph = onnx.load(str(tmp_path / "model.onnx"), load_external_data=False).graph
    used = {name for node in graph.node for name in node.input}
    assert {t.name for t in graph.initializer} <= used
    made = [name for node in graph.node for name in node.output if name]
    assert len(made) == len(set(made))
    assert all(set(node.output) & (used | {o.name for o in graph.output}) for node in graph.node)


def test_the_same_model_gives_the_same_bytes(tmp_path: Path) -> None:
    files = []
    for _ in range(2):
        program = raise_program(trace(make("llama", num_hidden_layers=1), info("llama")))
        lower(decoding(program, "fused"), tmp_path, positions=MAX_LENGTH)
        files.append([(tmp_path / name).read_bytes() for name in ("model.onnx", "model.weights")])
    assert files[0] == files[1]
