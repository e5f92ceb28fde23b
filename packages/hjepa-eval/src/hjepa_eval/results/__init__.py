"""Numbers with their names, counts and intervals: JSON with a schema, and tables of many files."""
