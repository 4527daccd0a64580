"""Text to tokens to activations to statistics; knows nothing of bits or grids and never imports ptq."""
