"""The HTTP side of the server; imports no torch, so it starts fast and outlives the device."""
