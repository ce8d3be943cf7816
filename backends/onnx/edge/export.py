"""`planc export --target edge`: an artifact becomes a folder that runs with ONNX Runtime and numpy alone, on a device or in a browser.

The folder is an artifact again, for greedy decoding one token a pass or for classification, so it is written, hashed and loaded like any other;
beside the graph lie `run.py`, a page, and in the manifest under `edge` what the graph is made of.
"""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from planc.backends.onnx.coded import CODED_FILE
from planc.backends.onnx.edge.graph import plain
from planc.backends.onnx.edge.mobile import suitability, to_ort_format
from planc.backends.onnx.engine import OnnxEngine
from planc.backends.onnx.images import OnnxImageEngine
from planc.backends.onnx.lower import MODEL_FILE, WEIGHT_FILE
from planc.runtime.artifact import Manifest, Signature, read_artifact, write_artifact
from planc.runtime.engine import Step
from planc.runtime.errors import ArtifactError
from planc.runtime.text import TEXT_FILES, TOKENIZER, Text
from planc.runtime.vision import ImageSpec

LABELS_FILE, PIECES_FILE = "labels.txt", "web/pieces.json"
_EXAMPLE = "Why is the sky blue?"
_MARK = "\x00prompt\x00"  # stands for a message in a chat template
_PROBED = (5, 1, 2)  # rows of the passes on which the graph is compared with the one it came from


def export_edge(source: Path, out: Path, *, ort_format: bool = False, note: Callable[[str], None] = lambda text: None) -> Manifest:
    """Write the artifact at `source` to `out` as a folder for a device or browser; complete or not at all.

    `ort_format` adds the graph with its weights as `model.ort`, and the list of operators for a reduced build of ONNX Runtime.
    Raises ArtifactError[export-refused] for what needs planc to run.
    """
    manifest = read_artifact(source)
    _check(manifest, source)

    def build(target: Path) -> Manifest:
        graph = onnx.load(str(source / MODEL_FILE), load_external_data=False)
        generates = manifest.task == "generation"
        if generates:
            graph = plain(graph)
        (target / MODEL_FILE).write_bytes(graph.SerializeToString())
        for name in (WEIGHT_FILE, LABELS_FILE, *TEXT_FILES):
            if name in manifest.files:
                shutil.copyfile(source / name, target / name)
        _copy_runner(target, "generate" if generates else "classify")
        found = _operators(graph) | (_text(target, manifest) if generates else {})
        made = _manifest(manifest)
        note("comparing with the artifact")
        _compare(source, manifest, target, made)
        note("asking for mobile accelerators")
        found["mobile"] = suitability(target / MODEL_FILE)
        if ort_format:
            note("converting to the ORT format")
            found["ort_format"] = to_ort_format(target / MODEL_FILE)
        return made.model_copy(update={"extra": {**made.extra, "edge": found}})

    return write_artifact(out, build)


def _check(manifest: Manifest, source: Path) -> None:
    why = fix = None
    if manifest.backend != "onnx":
        why = f"the artifact is for the backend {manifest.backend}"
    elif manifest.task == "filling":
        why = "a model that fills masked slots is run by a loop of planc"
    elif "kv" in manifest.extra:
        why, fix = "a cache with a policy is kept by planc", "leave `policy` out of `kv_cache`"
    elif CODED_FILE in manifest.files:
        why, fix = "entropy-coded weights are decoded by planc", "leave out the pass `entropy_code`"
    if why is not None:
        raise ArtifactError("export-refused", why, where=str(source), fix=fix or "run it with planc")


def _manifest(manifest: Manifest) -> Manifest:
    """That of the folder: one token a pass, no draft models, no batches in lanes."""
    decode = {**manifest.decode, "speculative": None, "batching": None, "context": None} if manifest.decode else {}
    signature = Signature.model_validate({**manifest.signature.model_dump(), "top_k": 0, "trees": False, "taps": ()})
    kept = {name: manifest.extra[name] for name in ("memory", "batches") if name in manifest.extra}
    return manifest.model_copy(update={"created_by": "planc.export", "decode": decode, "signature": signature, "extra": kept})


def _copy_runner(target: Path, kind: str) -> None:
    """`run.py`, the page and its scripts."""
    here = resources.files("planc.backends.onnx.edge")
    (target / "web").mkdir()
    named = {"run.py": here / f"{kind}.py", "index.html": here / "web" / f"{kind}.html"}
    named |= {f"web/{name}": here / "web" / name for name in (f"{kind}.js", "session.js", "page.css")}
    for name, file in named.items():
        (target / name).write_bytes(file.read_bytes())


def _operators(graph: onnx.ModelProto) -> dict[str, Any]:
    """Opsets, how often each operator occurs, and which are ONNX Runtime's own: some of those live in the standard domain."""
    opsets = {entry.domain: entry.version for entry in graph.opset_import}
    counts, own = Counter[str](), set[str]()
    for node in graph.graph.node:
        name = f"{node.domain}.{node.op_type}" if node.domain else node.op_type
        counts[name] += 1
        if not onnx.defs.has(node.op_type, max_inclusive_version=opsets[node.domain], domain=node.domain):
            own.add(name)
    return {"opsets": opsets, "operators": dict(sorted(counts.items())), "beyond_standard": sorted(own)}


def _text(target: Path, manifest: Manifest) -> dict[str, Any]:
    """What the runner and the page need of the text side, as far as there is one: the chat template around a message, an example, and the text of
    every token (written beside the page)."""
    text = Text.load(target, eos_ids=manifest.eos_ids)
    if TOKENIZER not in manifest.files:
        return {}
    chat: list[str] | None = None
    if text.chat_template is not None:
        parts = text.render_chat([{"role": "user", "content": _MARK}]).split(_MARK)
        chat = parts if len(parts) == 2 else None  # a template that repeats or changes the message has no fixed surroundings
    before, after = chat or ("", "")
    ids = text.encode(before + _EXAMPLE + after, special=chat is None)
    anchor = text.encode("a", special=False)  # decoders treat the first token of a text specially
    silent, known = text.silent_ids, text.decode(anchor)
    pieces = ["" if i in silent else text.decode([*anchor, i])[len(known) :] for i in range(manifest.signature.vocab_size)]
    (target / PIECES_FILE).write_text(json.dumps(pieces, ensure_ascii=False), encoding="utf-8")
    return {"chat": chat, "example": {"text": _EXAMPLE, "ids": ids}}


def _compare(source: Path, manifest: Manifest, target: Path, made: Manifest) -> None:
    """Both graphs on the same input, bit for bit: an export that does not load or computes something else is not written."""
    random, same = np.random.default_rng(0), True
    if manifest.task == "classification":
        pixels = random.standard_normal((1, *ImageSpec.model_validate(manifest.image).shape), np.float32)
        same = np.array_equal(*(OnnxImageEngine(*opened).forward(pixels) for opened in ((source, manifest), (target, made))))
    else:
        engines = [OnnxEngine(source, manifest), OnnxEngine(target, made)]
        caches = [engine.new_cache(1, sum(_PROBED)) for engine in engines]
        for rows in _PROBED:
            step = Step(random.integers(0, manifest.signature.vocab_size, (1, rows)))
            old, new = (engine.forward(cache, step, logits=True) for engine, cache in zip(engines, caches, strict=True))
            assert old.logits is not None and new.logits is not None
            same = same and np.array_equal(old.logits, new.logits)
            for cache in caches:
                cache.keep(0, np.arange(rows))
    if not same:
        raise ArtifactError("export-refused", "the exported graph computes something else than the artifact", where=str(source))


def describe(out: Path, manifest: Manifest) -> list[str]:
    """What was written, as lines for people."""
    edge, own = manifest.extra["edge"], manifest.extra["edge"]["beyond_standard"]
    size = sum(entry.bytes for entry in manifest.files.values()) / 2**20
    opsets = ", ".join(f"{domain or 'ai.onnx'} {version}" for domain, version in edge["opsets"].items())
    lines = [
        f"{out}: {size:.1f} MiB in {len(manifest.files)} files, {sum(edge['operators'].values())} nodes",
        f"operators  opset {opsets}; {'ONNX Runtime only: ' + ', '.join(own) if own else 'all standard'}",
        "mobile     " + ", ".join(f"{name} {verdict.lower()}" for name, verdict in edge["mobile"].items()),
    ]
    if "ort_format" in edge:
        lines.append(f"ORT format {', '.join(edge['ort_format'])}")
    prompt = '"Why is the sky blue?"' if TOKENIZER in manifest.files else "--ids 5 9 7"
    lines.append(f"run        python {out}/run.py {prompt if manifest.task == 'generation' else 'photo.jpg'}")
    lines.append(f"browser    python -m http.server -d {out}, with the files of onnxruntime-web's dist folder in {out}/ort")
    return lines
