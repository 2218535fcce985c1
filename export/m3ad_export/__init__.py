"""m3ad export: networks, checkpoints, training, ONNX, engines and parity; command `m3ad-export`."""
