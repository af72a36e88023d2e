"""Perplexity, divergence, speed and task accuracy, for PyTorch models and ONNX files alike."""
