"""The schemes stage: what a scheme gives each layer, and what that weighs, without training."""
