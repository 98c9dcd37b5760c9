"""Tensor arithmetic of quantization: stateless and differentiable, no nn.Module in here."""
