"""The C backend: ``cpu.c`` and its headers, and the module that fills its tables and calls it."""
