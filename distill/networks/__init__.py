"""Student, teacher and critic."""
