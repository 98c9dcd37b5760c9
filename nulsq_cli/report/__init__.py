"""What a quantized model looks like: entropy of its codes, as numbers and as a picture."""
