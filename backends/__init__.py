"""Backends: the reference meaning, ONNX Runtime, Triton."""
