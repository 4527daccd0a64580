"""What python -m ptq.benchmark is made of: models to run, what a phase must at least cost, what this machine can do."""
