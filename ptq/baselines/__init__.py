"""Tables of measured baselines beside published figures: the grid, its cells, the rows and the three files."""
