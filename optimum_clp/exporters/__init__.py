"""ONNX files: one in float32 and weight-only quantized ones, each checked against PyTorch."""
