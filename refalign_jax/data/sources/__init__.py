"""Sources of records, one file per kind of data set."""
