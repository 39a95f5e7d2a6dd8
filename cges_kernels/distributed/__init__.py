"""The step of parameters that are sharded over ranks."""
