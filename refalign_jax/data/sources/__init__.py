"""Sources of records: one file a data set."""
