"""Text-to-video serving of few-step distilled Wan students; importing the package imports nothing heavy."""

__version__ = "0.1.0"
