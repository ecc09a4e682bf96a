"""The distillation methods, one file per family."""
