"""The program `vflair`. Imports no torch before a command needs it."""
