"""What one pass through a model gives: inputs and output gradients of its layers, and what follows from them."""
