"""ONNX Runtime's own tools for phones: would an accelerator take the graph, and the graph in its flat format."""

from __future__ import annotations

import contextlib
import io
import logging
import re
from pathlib import Path

#: as the checker calls them
ACCELERATORS = ("NNAPI", "CoreML NeuralNetwork", "CoreML MLProgram")


def suitability(model: Path) -> dict[str, str]:
    """Per accelerator YES, MAYBE or NO, as ONNX Runtime's mobile usability checker judges the graph (with fixed shapes where that is better).

    NO is no defect: the graph then runs on the CPU, which takes every operator that it was made of.
    """
    from onnxruntime.tools.mobile_helpers.usability_checker import analyze_model

    heard = io.StringIO()
    logger = logging.getLogger("planc.export")
    logger.setLevel(logging.INFO)
    logger.propagate = False
    handler = logging.StreamHandler(heard)
    logger.addHandler(handler)
    try:
        analyze_model(model, skip_optimize=False, logger=logger)
    finally:
        logger.removeHandler(handler)
    said = re.findall(r"Model should perform well with (.+?) (?:as is|if modified.*?): (\w+)", heard.getvalue())
    order = ("NO", "MAYBE", "YES")
    return {name: max((verdict for about, verdict in said if about == name), key=order.index, default="unknown") for name in ACCELERATORS}


def to_ort_format(model: Path) -> list[str]:
    """Write `model.ort` and the operators it needs beside the model; the names of the two files."""
    from onnxruntime.tools.convert_onnx_models_to_ort import OptimizationStyle, convert_onnx_models_to_ort

    logging.disable(logging.INFO)  # it tells every step, on both streams
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            convert_onnx_models_to_ort(model, optimization_styles=[OptimizationStyle.Fixed])
    finally:
        logging.disable(logging.NOTSET)
    return [model.with_suffix(".ort").name, model.with_suffix(".required_operators.config").name]
