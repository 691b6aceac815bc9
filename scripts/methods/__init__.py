"""Parts of scripts/compare_methods.py."""
