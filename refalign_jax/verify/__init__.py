"""Cross-framework verification: values that another framework wrote, computed again here and compared."""
