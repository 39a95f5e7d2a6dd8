"""Training for sparsity: param groups for a model, schedules of the coefficients, and pruning."""
