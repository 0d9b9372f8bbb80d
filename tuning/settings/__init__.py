"""Every option, declared once: the command line, YAML files, and what contradicts."""
