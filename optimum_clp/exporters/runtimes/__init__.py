"""What other runtimes read beside the ONNX files."""
