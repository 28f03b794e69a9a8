"""The built-in adapters. They use the same door as anybody's: the entry-point group `gradtrace.adapters`."""
