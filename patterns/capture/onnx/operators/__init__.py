"""What ONNX operators compute, in torch's operations; one file a family, found and not listed."""
