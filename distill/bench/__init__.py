"""What a training iteration costs."""
