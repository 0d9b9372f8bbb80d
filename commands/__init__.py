"""What each script does once its arguments are read. May import every package; no package imports it."""
