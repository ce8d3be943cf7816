"""A second view of a plain artifact for onnxruntime-genai: the same weights behind the inputs that its decoding loop feeds.

That loop knows one mask over past and new tokens where our graph has `lengths` and `logits_from`, keeps the cache in one shared buffer per tensor
as GroupQueryAttention does, and describes every layer by one number of heads and one width. Where that is enough, `model_genai.onnx` and
`genai_config.json` stand beside `model.onnx`; where it is not, nothing is written and the manifest says why.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from planc.backends.onnx.build import live_nodes
from planc.backends.onnx.coded import CODED_FILE
from planc.backends.onnx.fused import LEAST_ROWS
from planc.backends.onnx.lower import MODEL_FILE
from planc.backends.onnx.packed import ATTENDING
from planc.compiler.program import Program
from planc.runtime.decode import Sampling

if TYPE_CHECKING:
    from planc.compiler.compile import Planned

GENAI_MODEL, GENAI_CONFIG = "model_genai.onnx", "genai_config.json"
_MASK = "attention_mask"
_FED = ("input_ids", "position_ids", "lengths", "logits_from")  # inputs that can be fed or computed from what is fed


@dataclass(frozen=True)
class Shape:
    """What genai_config.json says of the decoder; the same for every layer."""

    layers: int
    heads: int
    kv_heads: int
    width: int  # of a head
    hidden: int


def write_genai(planned: Planned, directory: Path, capacity: int) -> dict[str, Any]:
    """Write the two files beside `model.onnx` in `directory` if onnxruntime-genai can run its graph.

    Returns what the manifest says about it: `genai`, and `genai_reason` where that is false.
    """
    program, target = planned.program, planned.plan.target
    if target.ops != "fast":
        return _refused(f"the plan asks for {target.ops} operators, and the cache is shared in place by GroupQueryAttention only")
    if (directory / CODED_FILE).exists():
        return _refused("onnxruntime-genai cannot decode entropy-coded weights")
    graph = onnx.load(str(directory / MODEL_FILE), load_external_data=False)
    shape = shape_of(program, graph)
    if isinstance(shape, str):
        return _refused(shape)
    (directory / GENAI_MODEL).write_bytes(adapt(program, graph).SerializeToString())
    config = describe(planned, shape, capacity)
    (directory / GENAI_CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return {"genai": True}


def _refused(reason: str) -> dict[str, Any]:
    return {"genai": False, "genai_reason": reason}


def shape_of(program: Program, graph: onnx.ModelProto) -> Shape | str:
    """The shape that all layers share, or the reason why onnxruntime-genai cannot run the graph."""
    states = program.states
    if not states:
        return "the graph has no cache"
    cache = {f"{state.name}.{part}" for state in states for part in ("key", "value")}
    if odd := [name for name in program.inputs if name not in cache and name not in _FED]:
        return f"the graph has the input {odd[0]!r}, which onnxruntime-genai does not feed"
    if taps := [name for name in program.outputs if name.startswith("tap.")]:
        return f"the decoding loop reads {taps[0]!r}, which onnxruntime-genai does not know"
    attentions = [node for node in graph.graph.node if node.op_type == "GroupQueryAttention"]
    if len(attentions) != len(states):
        return f"{len(states) - len(attentions)} of {len(states)} attentions are not GroupQueryAttention"
    heads = {helper.get_node_attr_value(node, "num_heads") for node in attentions}
    shapes = {(state.heads, state.key_width, state.value_width, state.dtype) for state in states}
    if len(heads) > 1 or len(shapes) > 1:
        return "layers differ in the number or width of their heads"
    ((kv_heads, width, _, _),) = shapes
    return Shape(len(states), heads.pop(), kv_heads, width, _hidden(program))


def _hidden(program: Program) -> int:
    """Width of the embedding: the first value [B,R,K] that is made from the ids, which some models view in another shape before."""
    reached = [program.inputs["input_ids"]]
    for node in reached:
        for user in node.users:
            value = user.meta.get("val")
            if getattr(value, "ndim", 0) == 3:
                return int(value.shape[-1])
            reached.append(user)
    raise AssertionError("no hidden state comes from input_ids")


# ---- the graph ---------------------------------------------------------------------------------------------------------------------


def adapt(program: Program, source: onnx.ModelProto) -> onnx.ModelProto:
    """The graph with the interface of onnxruntime-genai.

    input_ids [B,R], attention_mask [B,T], position_ids [B,R] (where the model reads it): int64; past_key_values.N.key and .value
    [B,heads,capacity,width] -> logits [B,R,V], present.N.key and .value. T counts past and new tokens; a zero in the mask is padding.
    """
    model = onnx.ModelProto()
    model.CopyFrom(source)
    graph = model.graph
    renamed = {
        f"{name}{state.name.removeprefix('past')}.{part}": f"{new}.{index}.{part}"
        for index, state in enumerate(program.states)
        for part in ("key", "value")
        for name, new in (("past", "past_key_values"), ("present", "present"))
    }
    _rename(graph, renamed)
    kept = {*renamed.values(), "logits"}
    outputs = [value for value in graph.output if value.name in kept]
    nodes = [*_lengths(), *_least_rows(graph), *graph.node]
    live = live_nodes(nodes, [value.name for value in outputs])
    read = {name for node in live for name in node.input}
    constants = [
        numpy_helper.from_array(np.array([1], np.int64), "genai.axis"),
        numpy_helper.from_array(np.array([0], np.int64), "logits_from"),
    ]
    initializers = [tensor for tensor in (*graph.initializer, *constants) if tensor.name in read and tensor.name != LEAST_ROWS]
    inputs = [value for value in graph.input if value.name not in ("lengths", "logits_from")]
    inputs = [value for value in inputs if value.name != "position_ids" or value.name in read]
    batch = graph.input[0].type.tensor_type.shape.dim[0].dim_param
    inputs.insert(1, helper.make_tensor_value_info(_MASK, TensorProto.INT64, [batch, "total_length"]))
    _make_all_rows(outputs, graph.input[0])
    for field, values in (("node", live), ("initializer", initializers), ("input", inputs), ("output", outputs)):
        graph.ClearField(field)
        getattr(graph, field).extend(values)
    return model


def _lengths() -> list[onnx.NodeProto]:
    """lengths [B]: tokens of each sequence that are in the cache, all that the mask counts less the rows of this pass."""
    return [
        helper.make_node("ReduceSum", [_MASK, "genai.axis"], ["genai.tokens"], name="genai/tokens", keepdims=0),
        helper.make_node("Shape", ["input_ids"], ["genai.rows"], name="genai/rows", start=1, end=2),
        helper.make_node("Sub", ["genai.tokens", "genai.rows"], ["lengths"], name="genai/lengths"),
    ]


def _least_rows(graph: onnx.GraphProto) -> list[onnx.NodeProto]:
    """Rows that the attention works on at least, [1]: two as in the graph, but one in a batch, where GroupQueryAttention takes one row a
    sequence, and one where that loop's cache has no slot left for a spare row."""
    if all(tensor.name != LEAST_ROWS for tensor in graph.initializer):
        return []
    # less the number of sequences: what a single one needs, and too little to matter for more
    more = helper.make_tensor("genai.more", TensorProto.INT64, [1], [ATTENDING + 1])
    return [
        helper.make_node("Constant", [], ["genai.more"], name="genai/more", value=more),
        helper.make_node("Shape", ["input_ids"], ["genai.batch"], name="genai/batch", start=0, end=1),
        helper.make_node("Sub", ["genai.more", "genai.batch"], ["genai.wanted"], name="genai/wanted"),
        helper.make_node("Shape", ["past_key_values.0.key"], ["genai.slots"], name="genai/slots", start=2, end=3),
        helper.make_node("ReduceMax", ["lengths"], ["genai.longest"], name="genai/longest", keepdims=1),
        helper.make_node("Sub", ["genai.slots", "genai.longest"], ["genai.left"], name="genai/left"),
        helper.make_node("Min", ["genai.left", "genai.wanted"], [LEAST_ROWS], name="genai/least_rows"),
    ]


def _rename(graph: onnx.GraphProto, renamed: dict[str, str]) -> None:
    for node in graph.node:
        for names in (node.input, node.output):
            for i, name in enumerate(names):
                names[i] = renamed.get(name, name)
    for value in (*graph.input, *graph.output):
        value.name = renamed.get(value.name, value.name)


def _make_all_rows(outputs: list[onnx.ValueInfoProto], ids: onnx.ValueInfoProto) -> None:
    """Logits have as many rows as `input_ids` here."""
    logits = next(value for value in outputs if value.name == "logits")
    logits.type.tensor_type.shape.dim[1].CopyFrom(ids.type.tensor_type.shape.dim[1])


# ---- the description -----------------------------------------------------------------------------------------------------------------


def describe(planned: Planned, shape: Shape, capacity: int) -> dict[str, Any]:
    """Contents of genai_config.json. `capacity` is the longest text that the graph's tables cover."""
    plan, model = planned.plan, planned.model
    options: dict[str, Any] = {"log_id": "onnxruntime-genai", "provider_options": []}
    if plan.target.threads:
        options["intra_op_num_threads"] = plan.target.threads
    inputs = {"input_ids": "input_ids", "attention_mask": _MASK, "position_ids": "position_ids"}
    inputs |= {"past_key_names": "past_key_values.%d.key", "past_value_names": "past_key_values.%d.value"}
    ends = list(model.eos_ids)
    pad = _special(model.config, "pad_token_id")
    special: dict[str, Any] = {"pad_token_id": pad if pad is not None else ends[0] if ends else 0}
    if (bos := _special(model.config, "bos_token_id")) is not None:
        special["bos_token_id"] = bos
    if ends:
        special["eos_token_id"] = ends
    return {
        "model": {
            **special,
            "context_length": capacity,
            "decoder": {
                "session_options": options,
                "filename": GENAI_MODEL,
                "head_size": shape.width,
                "hidden_size": shape.hidden,
                "inputs": inputs,
                "outputs": {"logits": "logits", "present_key_names": "present.%d.key", "present_value_names": "present.%d.value"},
                "num_attention_heads": shape.heads,
                "num_hidden_layers": shape.layers,
                "num_key_value_heads": shape.kv_heads,
            },
            # every release reads this as "a decoder with a cache"; what the layers compute is in the graph
            "type": "llama",
            "vocab_size": planned.program.info.vocab_size,
        },
        "search": _search(plan.decode.sampling, capacity),
    }


def _special(config: Any, name: str) -> int | None:
    """A token id of the model's configuration, the first where it lists several."""
    value = getattr(config, name, None)
    value = value[0] if isinstance(value, list | tuple) and value else value
    return value if isinstance(value, int) else None


def _search(sampling: Sampling, capacity: int) -> dict[str, Any]:
    """How onnxruntime-genai draws tokens when its caller says nothing: as the plan does, but for its seed and min_p."""
    drawn = sampling.temperature > 0
    return {
        "do_sample": drawn,
        "temperature": sampling.temperature if drawn else 1.0,
        "top_k": sampling.top_k,  # 0 is all of them there, too
        "top_p": sampling.top_p,
        "repetition_penalty": sampling.repetition_penalty,
        "max_length": capacity,
        "min_length": 0,
        "num_beams": 1,
        "num_return_sequences": 1,
        "early_stopping": True,
        "length_penalty": 1.0,
        "diversity_penalty": 0.0,
        "no_repeat_ngram_size": 0,
        "past_present_share_buffer": True,  # GroupQueryAttention writes new keys and values in place
    }
