"""What any program needs around its work: files, the terminal, metrics, errors, exit codes."""
