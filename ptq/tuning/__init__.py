"""The scales of all blocks, tuned end to end after the walk."""
