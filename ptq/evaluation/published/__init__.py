"""Figures that others printed, as data: what they wrote, and what there is to doubt in it."""
