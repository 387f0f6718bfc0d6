"""Weight quantization: which layer gets how many bits (schemes), and the training fast path under Brevitas (fused)."""
