"""The embedded demo model: a small Llama trained on the standard library by tools/train_demo_model.py."""

from pathlib import Path

DEMO = Path(__file__).parent
