"""Reports of what became sparse: tables, CSV files, TensorBoard curves and figures."""
