"""softmax(scale q kᵀ + mask) v on a CPU."""
