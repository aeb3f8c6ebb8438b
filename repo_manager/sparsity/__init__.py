"""2:4 structured sparsity: where it holds, where it counts, and how to make it."""
