"""ONNX files as programs: read, run node by node with torch operations, and captured like any model."""
