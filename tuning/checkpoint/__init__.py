"""What is written, read again, resumed and merged."""
