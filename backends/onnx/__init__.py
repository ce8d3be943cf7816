"""ONNX: `lower` writes a Program as ONNX files, `engine` runs them with ONNX Runtime (no torch needed)."""
