"""Checkpoint -> ONNX files, each of which has passed its gates."""
