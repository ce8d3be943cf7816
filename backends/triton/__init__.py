"""Triton kernels and the GPU engine."""
