"""Estimates memory, operations and hours of a distillation run from closed forms, before renting a machine."""
