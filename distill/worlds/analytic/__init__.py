"""Worlds whose teacher is known in closed form, where distillation methods are compared in minutes."""
