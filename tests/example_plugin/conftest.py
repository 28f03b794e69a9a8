"""The package's own tests need it installed: tests/test_installed_plugins.py installs it, and runs them."""

collect_ignore = ["tests"]
