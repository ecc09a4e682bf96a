"""`codmd-serve bench`: measures this machine against its own ceilings and against stock diffusers."""
