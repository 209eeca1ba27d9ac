"""What follows a product in the same pass: activation, gate, factor and residual."""
