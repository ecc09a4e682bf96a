"""Methods compared: a declared table of arms, run unattended through the trainer, with paired intervals."""
