"""What gradients add to a solved block: codes and scales reconstructed, scales tuned."""
