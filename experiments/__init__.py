"""What the paper shows, made again from runs."""
