"""The exact sets of values that file formats can hold: fit, encode, decode, nothing else."""
