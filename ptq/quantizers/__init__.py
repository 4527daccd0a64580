"""Pure functions from (W, H, grid) to a QuantizedTensor, one file per method."""
