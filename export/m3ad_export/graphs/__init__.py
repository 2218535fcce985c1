"""A detector as ONNX graphs: their export, their precision, and their parity with PyTorch."""
