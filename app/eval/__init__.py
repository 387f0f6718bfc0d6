"""ONNX file -> COCO numbers and latency. Knows ONNX and COCO, nothing else."""
