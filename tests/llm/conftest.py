"""Small random models of several architectures, and the built-in one where it is truly needed."""
