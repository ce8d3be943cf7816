"""Names what images show, with the classifier in this folder.

    python run.py photo.jpg other.ppm

Needs onnxruntime and numpy. It reads .ppm (P6) and .npy (uint8 [rows, columns, 3], RGB) itself; other formats need Pillow.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

FOLDER = Path(__file__).resolve().parent
ONE = 1 << 22  # of a weight of resizing


def read(path: Path) -> np.ndarray:
    """An image, uint8 [rows, columns, 3] in RGB."""
    if path.suffix == ".npy":
        image = np.load(path, allow_pickle=False)
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
            sys.exit(f"{path} must be uint8 [rows, columns, 3], it is {image.dtype} {list(image.shape)}")
        return image
    data = path.read_bytes()
    if head := re.match(rb"P6\s+(?:#[^\n]*\n\s*)*(\d+)\s+(\d+)\s+255\s", data):
        columns, rows = int(head[1]), int(head[2])
        return np.frombuffer(data, np.uint8, rows * columns * 3, head.end()).reshape(rows, columns, 3)
    try:
        from PIL import Image, ImageOps
    except ImportError:
        sys.exit(f"{path} needs Pillow (pip install pillow); .npy and .ppm files do not")
    return np.asarray(ImageOps.exif_transpose(Image.open(path)).convert("RGB"))


def weights(old: int, new: int, kind: str) -> np.ndarray:
    """The matrix [new, old] that resamples one axis in units of 2^-22, as Pillow does: stretched where it shrinks."""
    scale = old / new
    centre, places = (np.arange(new)[:, None] + 0.5) * scale, np.arange(old)[None] + 0.5
    x = np.abs(places - centre) / max(scale, 1.0)
    if kind == "nearest":
        centre = np.cumsum([scale / 2] + [scale] * (new - 1))[:, None]  # added up, which decides where a centre falls between two pixels
        found = (np.floor(places) == np.floor(centre)).astype(np.float64)
    elif kind == "bilinear":
        found = np.maximum(1 - x, 0)
    else:  # Keys' cubic with a = -1/2
        found = np.where(x < 1, (1.5 * x - 2.5) * x * x + 1, np.where(x < 2, ((-0.5 * x + 2.5) * x - 4) * x + 2, 0))
    found = found / found.sum(1, keepdims=True) * ONE
    return np.trunc(found + np.copysign(0.5, found))


def resize(image: np.ndarray, rows: int, columns: int, kind: str) -> np.ndarray:
    """uint8 [rows, columns, 3] of another size: one axis after the other, rounded to whole numbers after each."""
    pixels = image.astype(np.float64)  # exact for the whole numbers below
    if columns != image.shape[1]:
        mixed = np.einsum("nx,yxc->ync", weights(image.shape[1], columns, kind), pixels, optimize=True)
        pixels = np.clip(np.floor((mixed + ONE / 2) / ONE), 0, 255)
    if rows != image.shape[0]:
        mixed = np.einsum("ny,yxc->nxc", weights(image.shape[0], rows, kind), pixels, optimize=True)
        pixels = np.clip(np.floor((mixed + ONE / 2) / ONE), 0, 255)
    return pixels.astype(np.uint8)


def prepare(image: np.ndarray, spec: dict[str, Any]) -> np.ndarray:
    """The image as the model takes it, float32 [1, 3, rows, columns] (or channels last): resized, cropped in the middle, scaled."""
    (rows, columns), (height, width) = spec["size"], image.shape[:2]
    high, wide = rows, columns
    if spec["resize"] is not None:
        share = spec["resize"] / min(width, height)
        high, wide = max(rows, round(height * share)), max(columns, round(width * share))
    top, left = (high - rows) // 2, (wide - columns) // 2
    pixels = resize(image, high, wide, spec["interpolation"])[top : top + rows, left : left + columns]
    scaled = (pixels.astype(np.float32) - np.float32(spec["mean"])) / np.float32(spec["std"])
    return np.ascontiguousarray(scaled.transpose(2, 0, 1) if spec["layout"] == "NCHW" else scaled, np.float32)[None]


def main() -> None:
    """See the top of this file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", nargs="+", type=Path)
    parser.add_argument("--graph", default="model.onnx", help="model.onnx, or model.ort where it was exported")
    options = parser.parse_args()
    manifest, labels = json.loads((FOLDER / "manifest.json").read_text(encoding="utf-8")), FOLDER / "labels.txt"
    names = labels.read_text(encoding="utf-8").splitlines() if labels.is_file() else []
    settings = ort.SessionOptions()
    if manifest["extra"].get("memory"):  # the graph is scheduled for little memory: give back at once what a node no longer needs
        settings.enable_cpu_mem_arena = settings.enable_mem_pattern = False
    session = ort.InferenceSession(str(FOLDER / options.graph), settings, providers=["CPUExecutionProvider"])
    for path in options.images:
        [logits] = session.run(["logits"], {"images": prepare(read(path), manifest["image"])})
        share = np.exp(logits[0].astype(np.float64) - logits.max())
        print(f"{path}:")
        for i in np.argsort(-logits[0], kind="stable")[:5]:
            print(f"{share[i] / share.sum():7.1%}  {names[i] if i < len(names) else i}")


if __name__ == "__main__":
    main()
