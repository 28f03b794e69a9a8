"""A run as one page that opens anywhere: what is in it, and how it is laid out."""
