"""From a sparse model to a small one."""
