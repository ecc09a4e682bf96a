"""What a distillation run needs before anyone rents a machine: memory, operations and hours, from closed forms."""
