"""What became sparse: tables, files, figures."""
