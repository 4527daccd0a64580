"""OmniQuant (arXiv 2308.13137), weight-only: a block's clipping and scales learned against its own outputs."""
