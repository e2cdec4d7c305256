"""The version of this program, as the records in patched processes carry it."""

VERSION = "0.1.0"
