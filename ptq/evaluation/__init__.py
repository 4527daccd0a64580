"""Measuring artefacts."""
