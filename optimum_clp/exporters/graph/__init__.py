"""The ONNX graph: traced, fused, quantized, written."""
