"""One file for each family of kernels: which operators it serves, how their tensors are laid out, and what runs them."""
