"""From QuantizedTensors to files; never rounds."""
