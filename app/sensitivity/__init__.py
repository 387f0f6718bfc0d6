"""The sensitivity stage: what each layer alone costs at each number of bits, and the scheme that fits a budget."""
